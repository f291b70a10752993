# SPDX-License-Identifier: Apache-2.0
"""apply_pre and remove_pre: Predictive Regularization on a Hugging Face model, by hooks alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from prereg_kernels._util import fsdp
from prereg_kernels._util.supported import check_transformers
from prereg_kernels.attach.config import PReConfig, Settings
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.forward import ModelForward
from prereg_kernels.attach.handle import ATTRIBUTE, PRe, get_pre, state_of
from prereg_kernels.attach.hooks import Hooks
from prereg_kernels.attach.projector_hook import ProjectorHook
from prereg_kernels.attach.resolver import resolve
from prereg_kernels.attach.saving import fill, save_pretrained
from prereg_kernels.attach.state import State
from prereg_kernels.attach.storage import load_heads


def apply_pre(
    model: nn.Module,
    config: PReConfig | None = None,
    *,
    family: Family | None = None,
    from_pretrained: str | Path | None = None,
    **overrides: Unpack[Settings],
) -> PRe:
    """Attach PRe: `model(**batch).loss` then carries the gradient of `L_LM + weight * L_PRe`.

    The heads become parameters of the model, so call this before you build the optimizer. In
    training the *value* of the loss stays L_LM, unless `value_in_forward=True`. In evaluation
    nothing changes. `from_pretrained` returns a model in eval mode, so call `model.train()`.
    `model.save_pretrained` writes a plain model, as before, and the heads to `pre/` beside it.

    Args:
        model: a supported Hugging Face model, such as `LlavaForConditionalGeneration`, or a
            PeftModel around one. Other wrappers come later: call this before
            DistributedDataParallel, FSDP and torch.compile.
        config: the settings. None: the paper's. overrides: single fields of it.
        family: where the model keeps its parts. PRe finds what it leaves out. None: all of it.
        from_pretrained: a local directory that `pre.save` or `model.save_pretrained` wrote. The
            settings and heads are read from there. Overrides may change whatever leaves the heads
            as they are, such as the weight, but not the layers. Pass an anchor function again. The
            heads get the dtype that new heads would get.

    Returns:
        The handle: heads, metrics, save and load.

    Raises:
        ValueError: the model is unsupported or wrapped, the family does not fit it, PRe is
            attached already, a layer does not exist, or settings do not fit the saved heads.
        FileNotFoundError: there are no heads at `from_pretrained`.
        TypeError: a setting is unknown.

    Example:
        >>> pre = apply_pre(model, layers=2, weight=0.5)
        >>> pre.heads[2]
        PReHead(weights=[(24, 24), (24, 24)], activation='gelu')
        >>> model.train()(**batch).loss.backward()  # the gradient of L_LM + 0.5 * L_PRe
        >>> sorted(pre.metrics())
        ['lm_loss', 'pre_loss', 'visual_tokens']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if config is not None and not isinstance(config, PReConfig):
        raise TypeError(f"config: expected a PReConfig or None, got {type(config).__name__}")
    if family is not None and not isinstance(family, Family):
        raise TypeError(f"family: expected a Family or None, got {type(family).__name__}")
    if config is not None and from_pretrained is not None:
        raise ValueError("config: expected None with from_pretrained, which has settings; got both")
    if get_pre(model) is not None:
        raise ValueError("model: PRe is attached already; call remove_pre(model) first")
    check_transformers()
    fsdp.check_whole(model)
    model = _inside_of_peft(model)
    resolution = resolve(model, family)
    if from_pretrained is None:
        state = State(model, (config or PReConfig()).replace(**overrides), resolution)
    else:
        saved, count = load_heads(from_pretrained), len(resolution.family.layers_of(model))
        restored = PReConfig.from_json(saved.config, overrides, count)
        state = State(model, restored, resolution)
        try:
            fill(state, saved, from_pretrained)
        except BaseException:
            state.detach()
            raise
    _attach_hooks(state)
    pre = PRe(state)
    state.shadow(ATTRIBUTE, pre)
    return pre


def remove_pre(model: nn.Module) -> None:
    """Detach PRe; the model is what it was: state_dict keys, hooks, outputs.

    Args:
        model: the model that was passed to `apply_pre`, or a wrapper around it.

    Raises:
        ValueError: PRe is not attached.

    Example:
        >>> names = list(model.state_dict())
        >>> pre = apply_pre(model)
        >>> list(model.state_dict()) == names
        False
        >>> remove_pre(model)
        >>> list(model.state_dict()) == names
        True
    """
    pre = get_pre(model)
    if pre is None:
        raise ValueError("model: PRe is not attached; expected a model that apply_pre was given")
    state_of(pre).detach()


def _inside_of_peft(model: Any) -> Any:
    """The model that a PeftModel adapts, which its calls go through; any other as it is."""
    # Its class has both, a model of transformers with adapters of its own the second alone
    is_peft = all(hasattr(type(model), name) for name in ("get_base_model", "peft_config"))
    return model.get_base_model() if is_peft else model


def _attach_hooks(state: State) -> None:
    """Put the hooks on the model; `state.detach` removes them."""
    model, family, hooks = state.model, state.family, Hooks(state)
    language_model, layers = family.language_model_of(model), family.layers_of(model)
    if hasattr(model, "save_pretrained"):  # PRe's file beside a plain model
        state.shadow("save_pretrained", partial(save_pretrained, state))
    state.shadow("forward", ModelForward(hooks, vars(model).get("forward")))
    state.hooks += [
        model.register_forward_pre_hook(hooks.begin, with_kwargs=True),
        language_model.register_forward_pre_hook(hooks.see_embeddings, with_kwargs=True),
        model.register_forward_hook(hooks.end, always_call=True),
    ]
    for inner in family.parts_around_language_model(model):
        state.hooks += [
            inner.register_forward_pre_hook(hooks.begin_inside, with_kwargs=True),
            inner.register_forward_hook(hooks.end, always_call=True),
        ]
    if state.config.anchor == "pre_projector":
        see_projector = ProjectorHook(hooks)
        for projector in family.projectors_of(model):
            hook = projector.register_forward_pre_hook(see_projector, with_kwargs=True)
            state.hooks.append(hook)
    if family.enters_at is not None:
        hooks.watch_entry()
    for number in state.heads:
        see: Any = partial(hooks.taps.see, number, _is_next_input(model, number, len(layers)))
        if number <= _layers_added_to(model):
            see = partial(_copied, see)
        state.hooks.append(layers[number - 1].register_forward_hook(see))


def _is_next_input(model: nn.Module, layer: int, layers: int) -> bool:
    """Whether this layer's output, as it is, is the input of the next layer."""
    # Qwen3-VL adds features to copies of the first outputs
    return _layers_added_to(model) < layer < layers


def _layers_added_to(model: nn.Module) -> int:
    """The first layers to whose outputs features are added: before transformers 5, and by ms-swift,
    in place."""
    vision: Any = getattr(getattr(model, "config", None), "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def _copied(see: Any, *args: Any) -> Any:
    """A hook's result as a tensor that may be written into, because the tap's result is a view."""
    output = see(*args)
    if isinstance(output, tuple):
        return output[0].clone(), *output[1:]
    return None if output is None else output.clone()
