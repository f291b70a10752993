# SPDX-License-Identifier: Apache-2.0
"""The heads' file: what was saved comes back, or an error that says what is wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from prereg_kernels import apply_pre
from prereg_kernels.attach.handle import state_of
from prereg_kernels.attach.saving import fill
from prereg_kernels.attach.storage import HEADS_FILE, Saved, load_heads, save_heads
from tests.fuzzing import damaged, fuzz
from tests.tiny import tiny_llava

SAVED = Saved(
    {"2.weight_0": torch.arange(6.0).reshape(2, 3), "2.bias_0": torch.tensor([0.5, -1.0]).half()},
    {"weight": 0.5, "layers": [2]},
    7,
)


def rewrite(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Other tensors in the file, as other tools or version 0.1.0 write it: without a checksum."""
    file = directory / HEADS_FILE
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["prereg"])
        heads = {name: change(name, opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    about.pop("sha256", None)
    save_file(heads, file, {"format": "pt", "prereg": json.dumps(about)})


def same(one: Saved, other: Saved) -> bool:
    heads = one.heads.keys() == other.heads.keys() and all(
        x.dtype == other.heads[name].dtype and torch.equal(x, other.heads[name])
        for name, x in one.heads.items()
    )
    return heads and (one.config, one.passes) == (other.config, other.passes)


def test_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    save_heads(tmp_path, SAVED)
    with safe_open(tmp_path / HEADS_FILE, "pt") as opened:
        assert len(json.loads(opened.metadata()["prereg"])["sha256"]) == 64
    assert same(load_heads(tmp_path), SAVED)
    rewrite(tmp_path, lambda name, x: x)
    assert same(load_heads(tmp_path), SAVED)


@fuzz(150)
@given(data=st.data())
def test_damage_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged heads"
    save_heads(path, SAVED)
    (path / HEADS_FILE).write_bytes(damaged(data.draw, (path / HEADS_FILE).read_bytes()))
    try:
        found = load_heads(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert same(found, SAVED)


def test_each_bit_of_the_numbers_is_guarded(tmp_path: Path) -> None:
    save_heads(tmp_path, SAVED)
    whole = (tmp_path / HEADS_FILE).read_bytes()
    numbers = sum(x.numel() * x.element_size() for x in SAVED.heads.values())
    for bit in range(8 * numbers):
        flipped = bytearray(whole)
        flipped[len(whole) - 1 - bit // 8] ^= 1 << bit % 8
        (tmp_path / HEADS_FILE).write_bytes(flipped)
        with pytest.raises(ValueError, match="other bytes than were saved"):
            load_heads(tmp_path)


@pytest.mark.parametrize(
    "dtype", (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
)
def test_heads_of_other_kinds_of_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_llava()
    pre = apply_pre(model)
    pre.save(tmp_path)
    before = {name: x.detach().clone() for name, x in model.pre_heads.named_parameters()}
    rewrite(tmp_path, lambda name, x: x.to(dtype) if name == "2.weight_1" else x)
    message = f"2.weight_1: expected one of .*float32.*, got {dtype}"
    with pytest.raises(ValueError, match=message):
        pre.load(tmp_path)
    with pytest.raises(ValueError, match=message):
        apply_pre(tiny_llava(), from_pretrained=tmp_path)
    state = {name: x.to(dtype) for name, x in before.items()}
    with pytest.raises(ValueError, match=f"got {dtype}"):
        fill(state_of(pre), Saved(state, state_of(pre).settings(), 0), "memory")
    with pytest.raises(ValueError, match=f"got {dtype}"):
        pre.save(tmp_path / "other", state)
    assert all(torch.equal(x, before[n]) for n, x in model.pre_heads.named_parameters())


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_heads_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    model = tiny_llava()
    pre = apply_pre(model)
    before = {name: x.detach().clone() for name, x in model.pre_heads.named_parameters()}
    with torch.no_grad():
        pre.heads[2].weight_1[3, 4] = value
    pre.save(tmp_path)
    model.pre_heads.load_state_dict(before)
    pre.passes = 3
    with pytest.raises(ValueError, match=r"expected finite numbers, got NaN .* in 2\.weight_1"):
        pre.load(tmp_path)
    with pytest.raises(ValueError, match=r"expected finite numbers, .* in 2\.weight_1"):
        apply_pre(tiny_llava(), from_pretrained=tmp_path)
    assert all(torch.equal(x, before[n]) for n, x in model.pre_heads.named_parameters())
    assert pre.passes == 3


@pytest.mark.parametrize("passes", (-1, 2**63, True, 1.5, "1", None))
def test_passes_are_a_count(tmp_path: Path, passes: Any) -> None:
    save_heads(tmp_path, SAVED._replace(passes=passes))
    with pytest.raises(ValueError, match="passes: expected a count, got"):
        load_heads(tmp_path)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_heads_that_are_saved_again_keep_their_permissions(tmp_path: Path) -> None:
    pre, directory = apply_pre(tiny_llava()), tmp_path / "shared"
    file = directory / HEADS_FILE
    with umask(0o027):
        pre.save(directory)
        assert (directory.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o750, 0o640)
        file.chmod(0o664)
        directory.chmod(0o2775)
        pre.save(directory)
    assert (directory.stat().st_mode & 0o7777, file.stat().st_mode & 0o777) == (0o2775, 0o664)
