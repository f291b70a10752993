# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: another one for whatever differs, the same for whatever does not."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from prereg_kernels.checkup.batches import Batch, ImageFacts
from prereg_kernels.checkup.fingerprint import _ROW, digest, of_code, of_files, of_model
from tests.attach.families.models import make_model

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8,
    torch.bool, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 3, 8, _ROW + 1, 3 * _ROW + 5])
def test_any_changed_value_of_a_tensor(dtype: torch.dtype, length: int) -> None:
    x = torch.zeros(length).to(dtype)
    before = digest(x)
    assert digest(x.clone()) == before
    for index in {0, 1, length // 2, length - 2, length - 1} - {-1, length}:
        other = x.clone()
        other[index] = 1
        assert digest(other) != before, index


def test_any_two_values_that_trade_places() -> None:
    """Within a row of the sum, across two rows, and across a row and a column."""
    x = torch.arange(3 * _ROW**2 // 2, dtype=torch.int32).view(torch.int64)
    before = digest(x)
    for a, b in ((0, 1), (5, _ROW + 5), (3 * _ROW + 7, 7 * _ROW + 3), (0, len(x) - 1)):
        other = x.clone()
        other[a], other[b] = x[b], x[a]
        assert digest(other) != before, (a, b)


def test_what_a_tensor_is_counts_and_how_it_lies_does_not() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    different = [x, x.reshape(8, 6), x.double(), x[:5], x[:0], x[:0].double(), x[0, 0], x.numpy()]
    assert len({digest(y) for y in different}) == len(different)
    assert digest(x.T.contiguous().T) == digest(x)
    packed = torch.cat([torch.zeros(1), x.flatten()])  # begins in the middle of a word
    assert digest(packed[1:].view(6, 8)) == digest(x)
    assert digest(torch.nn.Parameter(x)) == digest(x)


def test_a_tensor_without_content_is_unlike_any() -> None:
    x = torch.empty(3, device="meta")
    assert digest(x) != digest(x)


def test_tensors_inside_of_a_subclass() -> None:
    x = torch.arange(6.0)
    assert digest(_Wrapped(x)) == digest(_Wrapped(x.clone())) != digest(_Wrapped(2 * x))


class _Wrapped(torch.Tensor):
    """As DTensors and quantised weights are made: what it holds is in another tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __init__(self, inner: torch.Tensor) -> None:
        pass

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore
        raise NotImplementedError


def test_batches_count_with_all_they_hold() -> None:
    objects = np.zeros(2000, dtype=np.int64)  # more than repr shows
    batch = Batch({"x": torch.zeros(3)}, (ImageFacts("a", objects=objects),))
    other = objects.copy()
    other[1000] = 1
    changes = [
        batch,
        Batch({"y": torch.zeros(3)}, batch.images),
        Batch({"x": torch.ones(3)}, batch.images),
        Batch(batch.inputs, (ImageFacts("b", objects=objects),)),
        Batch(batch.inputs, (ImageFacts("a", objects=other),)),
        Batch(batch.inputs, (ImageFacts("a", objects=objects, labels={"class": "cat"}),)),
        Batch(batch.inputs, batch.images, (("b", "damaged"),)),
    ]
    assert len({digest(x) for x in changes}) == len(changes)
    assert digest(copy.deepcopy(batch)) == digest(batch)


def test_a_name_that_is_no_text() -> None:
    assert digest(os.fsdecode(b"caf\xe9")) != digest("caf\xe9")


def test_a_model_is_its_weights_buffers_config_and_adapters() -> None:
    def changed(change) -> set[str]:  # type: ignore[no-untyped-def]
        model = make_model("qwen2_5_vl").eval()
        before = of_model(model)
        change(model)
        after = of_model(model)
        return {key for key in before if before[key] != after[key]}

    def scale(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.lm_head.weight[3, 4] *= 2  # type: ignore

    def turn(model: torch.nn.Module) -> None:
        for name, buffer in model.named_buffers():
            if "inv_freq" in name:  # in no checkpoint
                buffer.mul_(2)

    assert changed(lambda model: None) == set()
    assert changed(lambda model: model.double()) == {"weights"}
    assert changed(scale) == {"weights"}
    assert changed(turn) == {"weights"}
    assert changed(lambda model: setattr(model.config, "image_token_id", 5)) == {"config"}
    assert changed(lambda model: setattr(model.config, "_name_or_path", "x")) == set()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(make_model("qwen2_5_vl"), config)
    before = of_model(lora.get_base_model())
    with lora.disable_adapter():
        without = of_model(lora.get_base_model())
    assert without["weights"] == before["weights"] and without["config"] != before["config"]
    assert of_model(lora.get_base_model()) == before


def test_files_that_are_changed_replaced_or_gone(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths[:2]:
        path.write_text("one")
    seen = [of_files(paths)]
    assert of_files(paths) == seen[0]
    paths[0].write_text("three")
    seen.append(of_files(paths))
    before = paths[1].stat()
    paths[1].write_text("two")
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    seen.append(of_files(paths))
    paths[2].write_text("new")
    seen.append(of_files(paths))
    paths[0].unlink()
    seen.append(of_files(paths))
    seen.append(of_files([paths[2], paths[1], paths[0]]))
    seen.append(of_files([None, tmp_path / "a\0b", *paths]))
    assert len(set(seen)) == len(seen)


def test_the_same_in_another_process() -> None:
    """Which has another seed of its own for the order of sets."""
    value = "digest({'a', 'b', 'c', 'd'}, {'x': (1, 2.5, None)}, torch.arange(9999)), of_code()"
    program = (
        f"import torch; from prereg_kernels.checkup.fingerprint import *; print(repr(({value})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    expected = (
        digest({"a", "b", "c", "d"}, {"x": (1, 2.5, None)}, torch.arange(9999)),
        of_code(),
    )
    assert found.stdout.strip() == repr(expected)
