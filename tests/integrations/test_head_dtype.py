# SPDX-License-Identifier: Apache-2.0
"""Models in low precision, whose heads are float32: gradients, files, wrappers, other dtypes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from prereg_kernels import PReConfig, apply_pre, eager_pre_loss, remove_pre
from prereg_kernels.attach.storage import load_heads, save_heads
from tests.attach.test_regularizer import traces
from tests.attached import NON_REENTRANT, eager_term, seen
from tests.helpers import relative_error
from tests.tiny import IMAGE_TOKEN, PATCHES, gradients, make_batch, tiny_llava
from tests.trainers.rows import make_rows, make_trainer

BF16 = torch.bfloat16


def low_batch(images: tuple[int, ...] = (1, 2), dtype: torch.dtype = BF16) -> dict[str, Any]:
    batch = make_batch(images)
    return batch | {"pixel_values": batch["pixel_values"].to(dtype)}


def head_dtypes(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.pre_heads.parameters()}


@pytest.mark.parametrize(
    "of_model, asked, expected",
    (
        (torch.float64, None, torch.float64),
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float32, "torch.float16", torch.float16),
        (torch.float64, "float32", torch.float32),
    ),
)
def test_the_dtype_of_heads(of_model: torch.dtype, asked: Any, expected: torch.dtype) -> None:
    """The same numbers in each, rounded once from float32."""
    model = tiny_llava().to(of_model)
    pre = apply_pre(model, head_dtype=asked, seed=3)
    assert head_dtypes(model) == {expected}
    whole = apply_pre(tiny_llava(), seed=3)
    for ours, theirs in zip(pre.heads[2].parameters(), whole.heads[2].parameters(), strict=True):
        assert torch.equal(ours, theirs.to(expected))


@pytest.mark.parametrize("asked, expected", ((None, BF16), ("float32", torch.float32)))
def test_heads_on_what_zero3_has_made(asked: Any, expected: torch.dtype) -> None:
    """Its engine refuses two dtypes there, without a word, and has float32 copies of its own."""
    model = tiny_llava().to(BF16)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    apply_pre(model, head_dtype=asked)
    assert head_dtypes(model) == {expected}


@pytest.mark.parametrize("asked", ("int8", torch.int32, torch.float8_e4m3fn, 16, "float"))
def test_a_dtype_that_heads_cannot_have(asked: Any) -> None:
    with pytest.raises(ValueError, match=r"head_dtype: expected None, or one of float16, .* got "):
        PReConfig(head_dtype=asked)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_to_follows_the_user(dtype: torch.dtype) -> None:
    model = tiny_llava()
    apply_pre(model)
    model.to(dtype)
    assert head_dtypes(model) == {dtype}
    assert head_dtypes(copy.deepcopy(model).float()) == {torch.float32}


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "two layers, one head": {"layers": (1, 3), "share_head": True},
    "images": {"layers": (1, 3), "level": "global"},
    "value": {"value_in_forward": True},
}


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_of_heads(setting: str, checkpointing: bool, autocast: bool) -> None:
    """Nearer than eager code to the definition in float64, on the states of the same pass."""
    model, batch, options = tiny_llava().to(BF16), low_batch(), SETTINGS[setting]
    pre = apply_pre(model, weight=1.0, **options)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    with seen(model) as states, torch.autocast("cpu", BF16, enabled=autocast):
        loss = model(**batch).loss
    states = {number: x.detach() for number, x in states.items()}
    loss.backward()
    ours = {name: x for name, x in gradients(model).items() if "pre_heads" in name}
    assert {x.dtype for x in ours.values()} == {torch.float32}

    def expected(upcast: torch.dtype | None) -> dict[str, Tensor]:
        mask = batch["input_ids"] == IMAGE_TOKEN

        def rows(layer: int) -> Tensor:
            if "level" not in options:
                return states[layer][mask]
            images = states[layer][mask].float().split(PATCHES)
            return torch.stack([image.mean(dim=0) for image in images]).to(BF16)

        model.zero_grad()
        losses = [
            eager_pre_loss(rows(layer), rows(0), head.weights, head.biases, upcast=upcast)
            for layer, head in pre.heads.items()
        ]
        torch.stack(losses).mean().backward()
        return {name: x for name, x in gradients(model).items() if "pre_heads" in name}

    truth, eager = expected(torch.float64), expected(None)
    for name, true in truth.items():
        assert not torch.equal(ours[name], ours[name].to(BF16).float()), f"{name} was rounded"
        assert relative_error(eager[name], true) < 0.02
    assert mean_error(ours, truth) < mean_error(eager, truth)


def mean_error(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Over the parameters whose gradient is more than rounding."""
    errors = [relative_error(ours[name], x) for name, x in truth.items() if x.norm() > 1e-4]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("checkpointing", (False, True))
def test_gradients_of_the_model(checkpointing: bool) -> None:
    """No further from those of the same weights in float64 than the definition's in bfloat16."""
    model, batch = tiny_llava().to(BF16), low_batch()
    pre = apply_pre(model, weight=3.0)
    if checkpointing:
        model.gradient_checkpointing_enable(NON_REENTRANT)
    model(**batch).loss.backward()
    ours = gradients(model)
    heads = pre.heads
    remove_pre(model)
    found = []
    for dtype in (torch.float64, BF16):
        plain, own = copy.deepcopy(model).to(dtype), copy.deepcopy(heads)
        if dtype == torch.float64:
            own[2].double()
        plain.zero_grad()
        own[2].zero_grad()
        pixels = batch["pixel_values"].to(dtype)
        lm, term = eager_term(plain, batch | {"pixel_values": pixels}, own)
        (lm + 3.0 * term).backward()
        grads = {f"pre_heads.2.{name}": p.grad for name, p in own[2].named_parameters()}
        found.append(gradients(plain) | grads)
    truth, eager = found
    assert 0 < mean_error(ours, truth) < 1.25 * mean_error(eager, truth) < 0.05


def test_resumed_training_is_uninterrupted_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `PReTrainer` on a bfloat16 model; its checkpoint is read in the model's own dtype."""
    read: list[torch.dtype] = []
    original = LlavaForConditionalGeneration.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["dtype"])
        return original(*args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", from_pretrained)
    rows = [row | {"pixel_values": row["pixel_values"].to(BF16)} for row in make_rows()]
    states = []
    for seed, checkpoint in ((0, None), (5, str(tmp_path / "checkpoint-2"))):
        model = tiny_llava(seed).to(BF16)
        apply_pre(model, seed=seed)
        trainer = make_trainer(
            model, tmp_path, rows=rows, per_device_train_batch_size=2, max_steps=4,
            save_strategy="steps", save_steps=2, learning_rate=1e-4,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        states.append({name: x.clone() for name, x in model.state_dict().items()})
        assert head_dtypes(model) == {torch.float32}
    whole, again = states
    assert all(torch.equal(again[name], x) for name, x in whole.items())
    assert read == [BF16]


def test_files_keep_float32(tmp_path: Path) -> None:
    """The model's file is bfloat16; the heads come back whole, on a bfloat16 model too."""
    model = tiny_llava().to(BF16)
    pre = apply_pre(model, seed=9)
    model.save_pretrained(tmp_path)
    saved = load_heads(tmp_path)
    assert {x.dtype for x in saved.heads.values()} == {torch.float32}
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")  # 5's default
    assert loaded.dtype == BF16
    again = apply_pre(loaded, from_pretrained=tmp_path)
    assert torch.equal(again.heads[2].weight_0, pre.heads[2].weight_0)
    assert head_dtypes(loaded) == {torch.float32}


def test_a_dtype_is_kept_with_the_heads_and_can_be_overridden(tmp_path: Path) -> None:
    pre = apply_pre(tiny_llava().to(BF16), head_dtype=torch.bfloat16)
    pre.save(tmp_path)
    assert load_heads(tmp_path).config["head_dtype"] == "bfloat16"
    again = apply_pre(tiny_llava().to(BF16), from_pretrained=tmp_path)
    assert again.config.head_dtype == BF16 and again.heads[2].weight_0.dtype == BF16
    wide = apply_pre(tiny_llava().to(BF16), from_pretrained=tmp_path, head_dtype=torch.float32)
    assert torch.equal(wide.heads[2].weight_0, pre.heads[2].weight_0.float())


def test_files_that_know_no_dtype(tmp_path: Path) -> None:
    """As older versions wrote them, with heads in the model's bfloat16."""
    pre = apply_pre(tiny_llava().to(BF16), head_dtype="bfloat16")
    pre.save(tmp_path)
    saved = load_heads(tmp_path)
    del saved.config["head_dtype"]
    save_heads(tmp_path, saved)
    again = apply_pre(tiny_llava().to(BF16), from_pretrained=tmp_path)
    assert torch.equal(again.heads[2].weight_0, pre.heads[2].weight_0.float())


@pytest.mark.parametrize("low", (torch.float16, torch.bfloat16))
def test_lora_on_a_frozen_base_in_low_precision(low: torch.dtype) -> None:
    """Adapters and heads are float32 alike, so that a GradScaler takes the gradients of both."""
    model, batch = tiny_llava().to(low), low_batch(dtype=low)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj")
    )
    pre = apply_pre(lora.base_model.model, weight=3.0)
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in pre.heads[2].parameters()]
    with torch.autocast("cpu", low):
        loss = lora(**batch).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = [p.grad.clone() for p in pre.heads[2].parameters()]
    scaler.step(optimizer)
    for p, old, grad in zip(pre.heads[2].parameters(), before, grads, strict=True):
        torch.testing.assert_close(p, old - 0.1 * grad)
        assert grad.norm() > 0


def test_compiled_layers() -> None:
    model, batch = tiny_llava().to(BF16), low_batch()
    pre = apply_pre(model, layers=(1, 3), weight=3.0)
    model(**batch).loss.backward()
    expected, figures = gradients(model), pre.metrics()
    model.zero_grad()
    torch._dynamo.reset()
    for layer in model.get_decoder().layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    model(**batch).loss.backward()
    ours = gradients(model)
    torch._dynamo.reset()
    assert pre.metrics() == pytest.approx(figures)
    for name in (name for name in expected if "pre_heads" in name):
        assert ours[name].dtype == torch.float32
        assert relative_error(ours[name], expected[name]) < 1e-6


@pytest.mark.parametrize("kind", (list, set, None))
def test_heads_are_units_of_fsdp(kind: type | None) -> None:
    """Accelerate's policy reads the names; gone with PRe, in copies too."""
    model = tiny_llava()
    before = None if kind is None else kind(["LlamaDecoderLayer"])
    model._no_split_modules = before
    found = traces(model)
    apply_pre(model)
    assert "PReHead" in model._no_split_modules
    assert kind is None or type(model._no_split_modules) is kind
    clone = copy.deepcopy(model)
    for one in (model, clone):
        remove_pre(one)
        assert one._no_split_modules == before and traces(one) == found


def test_accelerates_policy_picks_the_heads() -> None:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = tiny_llava()
    model._no_split_modules = {"LlamaDecoderLayer"}  # of those that it names it lacks some
    pre = apply_pre(model, layers=(1, 3))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert all(policy(head) for head in pre.heads.values())
    assert policy(model.get_decoder().layers[0]) and not policy(model)
