# SPDX-License-Identifier: Apache-2.0
"""Steps of models with PRe, by their own forward and by Liger's: `python -m ... FILE`.

The file gets {name: [a step's gradients and figures by its own forward, by Liger's, ...]}. Liger's
patched forward is real; its Triton functions are torch's here, as there is no GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

from prereg_kernels import apply_pre
from tests.attach.families.batches import make_batch
from tests.attach.families.models import make_model
from tests.tiny import gradients

NAMES = ("llava", "qwen2_5_vl")
SETTINGS: dict[str, Any] = {"layers": (1, 3), "weight": 3.0}


def step(model: Any, name: str, items: int | None = None) -> dict[str, Any]:
    model.zero_grad()
    inputs = make_batch(name, model, "several images").inputs
    more = {} if items is None else {"num_items_in_batch": items}
    output = model(**inputs, **more)
    output.loss.backward()
    figures = model._prereg.metrics()
    is_whole = output.logits is not None and output.logits.numel() > 0
    return {"gradients": gradients(model), "figures": figures, "has_logits": is_whole}


def put_torch_in_place() -> None:
    """Of Liger's Triton functions."""
    from liger_kernel.transformers import functional, monkey_patch, rms_norm, swiglu
    from liger_kernel.transformers.model import loss_utils
    from transformers.models.llama import modeling_llama

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * scale).to(x.dtype)

    def loss(
        x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, reduction: str = "mean",
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        value = F.cross_entropy(F.linear(x, weight).float(), target, reduction=reduction)
        return functional.CrossEntropyOutput(loss=value)

    monkey_patch.liger_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb
    rms_norm.LigerRMSNorm.forward = norm
    swiglu._swiglu_dispatch = lambda gate, up: F.silu(gate) * up
    loss_utils.F.liger_fused_linear_cross_entropy = loss


def main(path: str) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for name in NAMES:  # before Liger changes classes
        model = make_model(name)
        apply_pre(model, **SETTINGS)
        found[name] = [step(model, name)]
        found[f"{name}, by items"] = [step(model, name, 50)]
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    put_torch_in_place()
    for name in NAMES:
        for is_first in (True, False):
            model = make_model(name)
            if is_first:
                apply_pre(model, **SETTINGS)
            _apply_liger_kernel_to_instance(model)
            if not is_first:
                apply_pre(model, **SETTINGS)
            found[name].append(step(model, name))
            found[f"{name}, by items"].append(step(model, name, 50))
    torch.save(found, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
