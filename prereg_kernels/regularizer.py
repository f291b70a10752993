"""apply_pre and remove_pre: Predictive Regularization on a Hugging Face model, by hooks alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from prereg_kernels.config import PReConfig
from prereg_kernels.families import Family, find_family
from prereg_kernels.handle import ATTRIBUTE, PRe
from prereg_kernels.hooks import attach_hooks


def apply_pre(
    model: nn.Module,
    config: PReConfig | None = None,
    *,
    family: Family | None = None,
    **overrides: Any,
) -> PRe:
    """Attach PRe: `model(**batch).loss` then carries the gradient of `L_LM + weight * L_PRe`.

    The heads become parameters of the model: call this before building the optimizer. In training
    the *value* of the loss stays L_LM, unless `value_in_forward=True`; in evaluation nothing
    changes.

    Args:
        model: a supported Hugging Face model, such as `LlavaForConditionalGeneration`.
        config: settings; None: the paper's. overrides: single fields of it.
        family: where the model keeps its parts; None: as `prereg_kernels.families` has it.

    Returns:
        The handle: heads, metrics, save and load.

    Raises:
        ValueError: unsupported or wrapped model, a family that does not fit it, PRe attached
            already, a layer that does not exist.
        TypeError: an unknown setting.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if config is not None and not isinstance(config, PReConfig):
        raise TypeError(f"config: expected a PReConfig or None, got {type(config).__name__}")
    if family is not None and not isinstance(family, Family):
        raise TypeError(f"family: expected a Family or None, got {type(family).__name__}")
    if hasattr(model, ATTRIBUTE):
        raise ValueError("model: PRe is attached already; call remove_pre(model) first")
    config = (config or PReConfig()).replace(**overrides)
    pre = PRe(model, config, family or find_family(model))
    attach_hooks(pre)
    return pre


def remove_pre(model: nn.Module) -> None:
    """Detach PRe; the model is what it was: state_dict keys, hooks, outputs.

    Raises:
        ValueError: PRe is not attached.
    """
    pre = getattr(model, ATTRIBUTE, None)
    if pre is None:
        raise ValueError("model: PRe is not attached; expected a model that apply_pre was given")
    pre.detach()
