# SPDX-License-Identifier: Apache-2.0
"""Says so where a LoRA adapter trains beside a projector that stands still: PRe gains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from prereg_kernels.attach.family import Family
from prereg_kernels.attach.handle import PRe, state_of
from prereg_kernels.attach.resolver import is_pair

logger = logging.get_logger(__name__)


def warn_of_frozen_projector(pre: PRe) -> None:
    """Warn, once, where LoRA trains in the language model and nothing trains before it.

    Trainers freeze the projector by default with LoRA. What PRe gains then: docs/pays.md. It says
    nothing of a family that names no projector.
    """
    model = state_of(pre).model
    if pre.family.projector is None:
        return
    others = [pre.family.language_model_of(model), *pre.heads.values(), *_of_text(model)]
    known = {id(parameter) for module in others for parameter in module.parameters()}
    # Which a family of somebody's own may have within its language model
    projectors = pre.family.projectors_of(model)
    known -= {id(parameter) for module in projectors for parameter in module.parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_adapted = any("lora_" in name for name, _ in trained)
    if is_adapted and all(id(parameter) in known for _, parameter in trained):
        logger.warning_once(
            f"PRe: the projector, {_whole(model, pre.family)}, is frozen beside the LoRA adapter. "
            "A small model gained nothing by PRe in that way, and clearly where the projector "
            "trained as well (docs/pays.md). PEFT's modules_to_save trains it, which "
            "LLaMA-Factory calls additional_target, and TRL and axolotl lora_modules_to_save; "
            "`prereg doctor MODEL` names its modules"
        )


def _whole(model: nn.Module, family: Family) -> str:
    """The projector's path. PRe looks at one of its modules in some families, as Gemma 3's norm."""
    path, llm = str(family.projector), family.language_model_of(model)
    while outer := path.rpartition(".")[0]:
        module = model.get_submodule(outer)
        if isinstance(module, PreTrainedModel) or any(inner is llm for inner in module.modules()):
            break
        path = outer
    return path


def _of_text(model: Any) -> Iterator[nn.Module]:
    """What belongs to the LLM and is not within it: embeddings, and a pair's decoder."""
    names = ["get_input_embeddings", "get_output_embeddings"]
    if is_pair(getattr(model, "config", None)):
        names.append("get_decoder")
    for name in names:
        with suppress(AttributeError, NotImplementedError):  # a model of somebody's own
            if (module := getattr(model, name)()) is not None:
                yield module
