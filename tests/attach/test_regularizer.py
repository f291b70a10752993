# SPDX-License-Identifier: Apache-2.0
"""apply_pre's files, its traces on the model, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.attach.storage import load_heads
from tests.tiny import LAYERS, WIDTH, make_batch, tiny_llava


def traces(model: nn.Module) -> dict[str, Any]:
    """What somebody could find of PRe on a model."""
    hooks = {
        (name, kind): len(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    }
    ignored = getattr(model, "_keys_to_ignore_on_save", None)
    return {
        "state_dict": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "hooks": hooks,
        "attributes": sorted(vars(model)),
        "ignored": None if ignored is None else set(ignored),
    }


def test_remove_restores_everything() -> None:
    model, batch = tiny_llava(), make_batch()
    plain = model(**batch)  # transformers leaves hooks of its own on the first call
    before = traces(model)
    apply_pre(model, layers=(1, 2))
    assert traces(model)["state_dict"] != before["state_dict"]
    model(**batch).loss.backward()
    model.zero_grad()
    remove_pre(model)
    assert traces(model) == before
    after = model(**batch)
    assert torch.equal(after.loss, plain.loss) and torch.equal(after.logits, plain.logits)


def test_remove_restores_the_keys_ignored_on_save() -> None:
    model = tiny_llava()
    model._keys_to_ignore_on_save = ["something"]
    apply_pre(model)
    assert "something" in model._keys_to_ignore_on_save
    assert "pre_heads.2.weight_0" in model._keys_to_ignore_on_save
    remove_pre(model)
    assert model._keys_to_ignore_on_save == ["something"]


def test_heads_are_parameters_of_the_model() -> None:
    model = tiny_llava()
    pre = apply_pre(model, layers=(1, 3))
    names = {n for n, _ in model.named_parameters() if "pre_heads" in n}
    assert names == {
        f"pre_heads.{i}.{p}_{j}" for i in (1, 3) for p in ("weight", "bias") for j in (0, 1)
    }
    assert list(pre.heads) == [1, 3]
    assert model.to(torch.bfloat16) is model
    assert pre.heads[3].weight_0.dtype == torch.bfloat16


def test_heads_of_a_quantised_model_are_not() -> None:
    model = tiny_llava()
    layer = model.model.language_model.layers[1]
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    head = apply_pre(model, layers=2).heads[2]
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}


def test_generators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs' as well, which torch.manual_seed would seed even where the CPU's is restored."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model, before = tiny_llava(), torch.get_rng_state()
    seeded.clear()
    apply_pre(model, seed=5)
    assert torch.equal(torch.get_rng_state(), before) and not seeded


def test_a_replica_of_data_parallel_raises() -> None:
    model, batch = tiny_llava(), make_batch()
    apply_pre(model)
    model._is_replica = True  # as nn.DataParallel marks its copies
    with pytest.raises(ValueError, match=r"got a replica of torch\.nn\.DataParallel"):
        model(**batch)


def test_save_pretrained_writes_a_plain_model(tmp_path: Path) -> None:
    model, batch = tiny_llava(), make_batch()
    apply_pre(model)
    model.save_pretrained(tmp_path)
    loaded, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    remove_pre(model)
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


def test_save_and_load(tmp_path: Path) -> None:
    first = apply_pre(tiny_llava(), layers=(1, 3), seed=1)
    second = apply_pre(tiny_llava(), layers=(1, 3), seed=2)
    assert not torch.equal(first.heads[3].weight_0, second.heads[3].weight_0)
    first.save(tmp_path / "new" / "folder")
    second.load(tmp_path / "new" / "folder")
    for layer in (1, 3):
        pairs = zip(first.heads[layer].parameters(), second.heads[layer].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["pre_heads.safetensors"]
    config = load_heads(tmp_path / "new" / "folder").config
    assert config["layers"] == [1, 3]
    assert config["weight"] == 0.5 and config["seed"] == 1 and config["anchor"] == "pre_llm"


@pytest.mark.parametrize(
    "other, message",
    (
        ({"layers": 1}, r"layers=\[2\], expected \[1\]"),
        ({"depth": 1}, "depth=2, expected 1"),
        ({"activation": "relu"}, "activation='gelu', expected 'relu'"),
        ({"loss": "mse"}, "loss='cosine', expected 'mse'"),
        ({"head_features": 5}, r"heads do not fit: expected .*\(5, 24\).* got .*2\.weight_0"),
    ),
)
def test_load_refuses_what_does_not_fit(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    apply_pre(tiny_llava()).save(tmp_path)
    pre = apply_pre(tiny_llava(), **other)
    before = [p.clone() for p in pre.heads[next(iter(pre.heads))].parameters()]
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        pre.load(tmp_path)
    after = pre.heads[next(iter(pre.heads))].parameters()
    assert all(map(torch.equal, before, after))


def test_load_names_the_normalization(tmp_path: Path) -> None:
    apply_pre(tiny_llava(), loss="mse", normalize="layer").save(tmp_path)
    with pytest.raises(ValueError, match=r"path: .*normalize='layer', expected 'l2'"):
        apply_pre(tiny_llava(), loss="mse", normalize="l2").load(tmp_path)


def test_load_cares_for_nothing_but_the_heads(tmp_path: Path) -> None:
    apply_pre(tiny_llava(), weight=0.25, seed=1, value_in_forward=True).save(tmp_path)
    pre = apply_pre(tiny_llava(), weight=2.0, seed=2)
    saved = apply_pre(tiny_llava(), seed=1)
    pre.load(tmp_path)
    assert torch.equal(pre.heads[2].weight_0, saved.heads[2].weight_0)


@pytest.mark.parametrize("damage", ("empty", "half", "garbage", "of another program"))
def test_load_of_a_damaged_file(tmp_path: Path, damage: str) -> None:
    pre = apply_pre(tiny_llava())
    pre.save(tmp_path)
    before = [p.clone() for p in pre.heads[2].parameters()]
    file = tmp_path / "pre_heads.safetensors"
    whole = file.read_bytes()
    content = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "garbage": b"\xff\x00garbage" * 9,
        "of another program": safetensors.torch.save(load_heads(tmp_path).heads),
    }
    file.write_bytes(content[damage])
    with pytest.raises(ValueError, match=f"path: .*{re.escape(str(tmp_path))}"):
        pre.load(tmp_path)
    assert all(map(torch.equal, before, pre.heads[2].parameters()))


def test_load_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path: expected a directory with pre_heads"):
        apply_pre(tiny_llava()).load(tmp_path)


def test_interrupted_save_leaves_the_old_file(
    tmp_path: Path, fill_disk: Callable[[], None]
) -> None:
    apply_pre(tiny_llava(), seed=1).save(tmp_path)
    old = (tmp_path / "pre_heads.safetensors").read_bytes()
    fill_disk()
    with pytest.raises(OSError, match="No space left"):
        apply_pre(tiny_llava(), seed=2).save(tmp_path)
    assert (tmp_path / "pre_heads.safetensors").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1
    assert load_heads(tmp_path).config["seed"] == 1


def test_apply_twice() -> None:
    model = tiny_llava()
    apply_pre(model)
    with pytest.raises(ValueError, match=r"model: PRe is attached already; call remove_pre"):
        apply_pre(model)
    remove_pre(model)
    assert list(apply_pre(model).heads) == [2]


def test_remove_without_apply() -> None:
    with pytest.raises(ValueError, match="model: PRe is not attached"):
        remove_pre(tiny_llava())


def test_unsupported_models() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9,
                    num_attention_heads=1)
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'llama'\) is not supported: its config has no id"):
        apply_pre(llama)
    with pytest.raises(ValueError, match=r"LlavaModel .* is not supported"):
        apply_pre(tiny_llava().model)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        apply_pre("llava")


@pytest.mark.parametrize(
    "overrides, exception, message",
    (
        ({"layers": LAYERS + 1}, ValueError, "layers: the decoder has 4 layers.* got 5"),
        ({"layers": 0}, ValueError, "layers: the decoder has 4 layers.* got 0"),
        ({"layer": 2}, TypeError, "layer: not a setting of PRe; expected one of layers"),
        ({"config": {"layers": 2}}, TypeError, "config: expected a PReConfig or None, got dict"),
        ({"weight": -1}, ValueError, "weight: expected a non-negative finite number, got -1"),
    ),
)
def test_bad_settings_leave_no_trace(
    overrides: dict[str, Any], exception: type[Exception], message: str
) -> None:
    model = tiny_llava()
    before = traces(model)
    with pytest.raises(exception, match=message):
        apply_pre(model, **overrides)
    assert traces(model) == before


def test_input_ids_are_needed() -> None:
    model, batch = tiny_llava(), make_batch((0, 0))
    apply_pre(model)
    batch["inputs_embeds"] = torch.zeros(2, 14, WIDTH)
    del batch["input_ids"]
    with pytest.raises(ValueError, match="input_ids: PRe finds the visual tokens by it"):
        model(**batch)


def test_a_failed_forward_leaves_the_model_usable() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    model(**batch).loss.backward()
    expected = pre.metrics()
    bad = batch | {"pixel_values": batch["pixel_values"][:1]}
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        model(**bad)
    model.zero_grad()
    model(**batch).loss.backward()
    assert pre.metrics() == expected
