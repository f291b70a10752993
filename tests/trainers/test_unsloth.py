# SPDX-License-Identifier: Apache-2.0
"""A stand-in of what Unsloth (2026.10) puts around a model and a trainer; it needs a GPU itself.

`FastVisionModel.get_peft_model(use_gradient_checkpointing="unsloth")` patches checkpoint functions:
a layer's first pass has no grad, its input goes to a host buffer, backward brings it back into one
staging buffer that all layers share, and the last layer's input stays where it is. The model's
forward computes its loss from the hidden states, and its logits raise on any use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, modeling_utils
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
)

from prereg_kernels.trainers import with_pre
from tests.attached import compare
from tests.tiny import WIDTH, gradients, tiny_llava
from tests.trainers.rows import make_rows, step_gradients

DECODER = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
SETTINGS: dict[str, Any] = {"weight": 3.0, "layers": (1, 3, 4)}
staging = torch.zeros(0)
calls: list[str] = []


class EmptyLogits:
    """Any use is an error."""

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"Unsloth: Logits are empty! ({name})")

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError("Unsloth: Logits are empty!")


class FusedLlava(LlavaForConditionalGeneration):
    """Its forward as Unsloth compiles it."""

    def forward(self, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        hidden = self.model(**inputs)[0]
        reduction = "mean" if num_items_in_batch is None else "sum"
        logits = self.lm_head(hidden)[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), reduction=reduction
        )
        if num_items_in_batch is not None:
            loss = loss / num_items_in_batch
        return LlavaCausalLMOutputWithPast(loss=loss, logits=EmptyLogits())


class SmartCheckpoint(torch.autograd.Function):
    """Its input is offloaded where it is large, but that of the last of the layers."""

    @staticmethod
    def forward(ctx: Any, function: Any, is_last: bool, *args: Any) -> Any:
        global staging
        calls.append("first")
        hidden = args[0]
        ctx.function, ctx.others, ctx.host = function, args[1:], None
        if is_last:
            ctx.save_for_backward(hidden)
        else:
            ctx.host = hidden.detach().clone()
            if staging.numel() < hidden.numel():
                staging = hidden.new_zeros(hidden.numel())
        with torch.no_grad():
            return function(*args)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        if ctx.host is None:
            (saved,) = ctx.saved_tensors
            hidden = saved.detach().requires_grad_(True)
        else:
            buffer = staging[: ctx.host.numel()].view(ctx.host.shape)
            buffer.copy_(ctx.host)
            hidden = buffer.detach().requires_grad_(True)
        with torch.enable_grad():
            output = ctx.function(hidden, *ctx.others)
        outputs = output if isinstance(output, tuple) else (output,)
        pairs = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x.requires_grad]
        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        return (None, None, hidden.grad, *[None] * len(ctx.others))


def unsloth_checkpoint(function: Any, *args: Any, use_reentrant: Any = None, **kwargs: Any) -> Any:
    """Reentrant whatever it is asked for; called with a layer and its states."""
    # transformers gives the layer's bound call, from 5.24 its forward and the layer
    layer = getattr(function.func, "__self__", None) or function.args[0]
    is_last = getattr(layer.self_attn, "layer_idx", -1) == 3
    return SmartCheckpoint.apply(function, is_last, *args)


def make_model(patched: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As `FastVisionModel.get_peft_model` returns it; or PEFT's own, without checkpointing."""
    model: Any = tiny_llava()
    if patched:
        model.__class__ = FusedLlava
        monkeypatch.setattr(modeling_utils, "checkpoint", unsloth_checkpoint)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=DECODER, init_lora_weights=False, task_type="CAUSAL_LM",
        modules_to_save=["multi_modal_projector"],
    )  # fmt: skip
    lora = peft.get_peft_model(model, config)
    if patched:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.model.vision_tower.gradient_checkpointing_disable()
    return lora


class UnslothTrainer(Trainer):
    """`compute_loss` as Unsloth patches it: the count goes to the model by the batch."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        items = kwargs.get("num_items_in_batch")
        if items is not None and "num_items_in_batch" not in inputs:
            inputs["num_items_in_batch"] = items
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("micro_batch, micro_batches", ((4, 1), (2, 2), (1, 4)))
def test_gradients_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int, micro_batches: int
) -> None:
    """Those without Unsloth, whatever the micro-batches."""
    monkeypatch.setattr(FusedLlava, "accepts_loss_kwargs", True, raising=False)
    rows = make_rows(images=(1, 2, 1, 2))
    found: list[dict[str, Tensor]] = []
    for patched in (False, True):
        calls.clear()
        shape = (micro_batch, micro_batches) if patched else (4, 1)
        [step] = step_gradients(
            make_model(patched, monkeypatch), tmp_path, *shape, rows=rows,
            cls=with_pre(UnslothTrainer if patched else Trainer, **SETTINGS),
        )  # fmt: skip
        found.append(step)
    assert len(calls) == 4 * micro_batches  # of the decoder's layers
    assert staging.numel() >= micro_batch * WIDTH
    heads = [x.norm() for name, x in found[0].items() if "pre_heads" in name]
    assert len(heads) == 12 and min(heads) > 0
    projector = [x.norm() for name, x in found[0].items() if "projector.modules_to_save" in name]
    assert len(projector) == 4 and min(projector) > 0  # beside LoRA, as the page has it
    compare(found[1], found[0])


def test_a_loop_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`apply_pre` on what `get_peft_model` returned, as the page has it."""
    from prereg_kernels import apply_pre
    from tests.tiny import make_batch

    found, figures = [], []
    for patched in (False, True):
        model = make_model(patched, monkeypatch)
        pre = apply_pre(model, **SETTINGS)
        pre.check()
        model(**make_batch((1, 2))).loss.backward()
        found.append(gradients(model))
        figures.append(pre.metrics())
    compare(found[1], found[0])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
