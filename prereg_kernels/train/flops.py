# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations: what a model's training step needs, and what a device can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prereg_kernels.train.models import without_adapter
from prereg_kernels.train.parts import PARTS, parts_of

PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12, "MI300X": 1307e12,
}  # fmt: skip
"""{a part of the device's name: dense 16-bit matrix operations a second}, of which the first that
fits counts. Source: the makers' data sheets of each product (NVIDIA, AMD), without sparsity."""


def peak_flops(device: torch.device) -> float | None:
    """Of bfloat16 and float16; None of a CPU, and of a device that is not listed."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """By a device's name."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class StepFlops:
    """What a model's forward and backward need, by its parameters.

    It is the usual 2 N for each token forward, 2 N for the gradient of the weights that train, and
    2 N for the gradient that goes on to what trains before them; 6 N where all trains. Attention's
    own products are left out, and so is what checkpointing does again, and PRe.

    Args:
        model: a plain one, or PEFT's.
    """

    def __init__(self, model: Any) -> None:
        self._per_token: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        model = without_adapter(model)
        self._patch = _patch(model)
        config = model.config.get_text_config()
        counts = ("num_experts", "num_local_experts", "n_routed_experts")
        is_sparse = any(getattr(config, name, None) for name in counts)
        # What ZeRO-3 has taken apart has no size
        is_whole = all(p.numel() for p in model.parameters())
        is_quantized = getattr(model, "is_quantized", False)
        self.is_known = is_whole and not is_sparse and not is_quantized
        skipped = _looked_up(model)
        named, trains_before = dict(model.named_parameters()), False
        for part, names in parts_of(model).items():  # in the order of a forward pass
            for name in names:
                parameter = named[name]
                is_copied = "original_module" in name  # PEFT trains the copy
                if parameter.dim() > 1 and id(parameter) not in skipped and not is_copied:
                    passes = 1 + parameter.requires_grad + trains_before
                    self._per_token[part] += 2.0 * parameter.numel() * passes
                trains_before |= parameter.requires_grad

    def of(self, tokens: float, visual_tokens: float, pixels: float) -> float | None:
        """Of so many tokens, as `Facts` counts them; None where it is not known."""
        if not self.is_known or (pixels and self._patch is None):
            return None
        patches = pixels / self._patch if self._patch else 0.0
        counts = {"tower": patches, "projector": visual_tokens, "llm": tokens}
        return sum(self._per_token[part] * counts[part] for part in PARTS)


def _patch(model: Any) -> float | None:
    """Numbers of pixels that a patch has; None: the config does not say."""
    vision = getattr(model.config, "vision_config", None)
    size = getattr(vision, "patch_size", None)
    if not isinstance(size, int):
        return None
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return float(channels * size**2 * (getattr(vision, "temporal_patch_size", None) or 1))


def _looked_up(model: Any) -> set[int]:
    """The tables that nothing is multiplied by."""
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return tables - ({id(head.weight)} if head is not None else set())
