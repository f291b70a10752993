"""The hooks of a forward pass of a model with PRe attached.

Four hooks: the model's call begins a forward pass and notes the visual tokens; the language model's
call shows the anchor, its input embeddings; each regularised decoder layer's output goes through
the tap; the model's result gets the term added to its loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels.handle import PRe, Record


def attach_hooks(pre: PRe) -> None:
    """Put the hooks on `pre.model`; `pre.detach` removes them."""
    model, language_model = pre.model, pre.family.language_model_of(pre.model)
    layers, hooks = pre.family.layers_of(model), _Hooks(pre)
    pre.hooks += [
        model.register_forward_pre_hook(hooks.begin, with_kwargs=True),
        language_model.register_forward_pre_hook(hooks.see_embeddings, with_kwargs=True),
        model.register_forward_hook(hooks.end, always_call=True),
    ]
    for number in pre.heads:
        hook = partial(hooks.see_layer, number)
        pre.hooks.append(layers[number - 1].register_forward_hook(hook))


@dataclass
class _Pass:
    """What one forward pass of the model needs to remember; gone when it ends."""

    inputs: Mapping[str, Any]
    index: Tensor  # (N,) visual positions in the flattened batch
    training: bool
    denominator: float | Tensor | None
    anchor: Tensor | None = None  # (batch, positions, A) or (N, A)
    losses: dict[int, Tensor] = field(default_factory=dict)  # per layer, 0-dim
    values: dict[int, Tensor] = field(default_factory=dict)  # where their values will be


class _Hooks:
    """In the order in which a forward pass meets them."""

    def __init__(self, pre: PRe) -> None:
        language_model = pre.family.language_model_of(pre.model)
        self._pre = pre
        self._pass: _Pass | None = None  # while the model's forward runs
        self._arguments = tuple(inspect.signature(pre.model.forward).parameters)
        self._decoder_arguments = tuple(inspect.signature(language_model.forward).parameters)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        training = model.training and torch.is_grad_enabled()
        self._pass = None
        if not training and not self._pre.config.value_in_eval:
            return
        if training:
            self._pre.loss = self._pre.last = None
        inputs = dict(zip(self._arguments, args, strict=False)) | kwargs
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise ValueError("input_ids: PRe finds the visual tokens by it; expected ids, got None")
        index = self._pre.visual_mask(input_ids).flatten().nonzero().squeeze(1)
        # with no visual tokens the term is 0, whatever it is divided by
        denominator = self._pre.denominator if index.numel() else None
        self._pass = _Pass(inputs, index, training, denominator)

    def see_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        current = self._pass
        if current is None:
            return
        anchor = self._pre.config.anchor
        if callable(anchor):
            self._pass = None  # the function may call parts of the model
            with torch.no_grad():
                current.anchor = self._check_anchor(anchor(current.inputs), current)
            self._pass = current
        else:
            inputs = dict(zip(self._decoder_arguments, args, strict=False)) | kwargs
            if inputs.get("inputs_embeds") is not None:
                current.anchor = inputs["inputs_embeds"].detach()

    def _check_anchor(self, anchor: Any, current: _Pass) -> Tensor:
        expected = (current.index.numel(), self._pre.config.anchor_features)
        if not isinstance(anchor, Tensor) or tuple(anchor.shape) != expected:
            came = tuple(anchor.shape) if isinstance(anchor, Tensor) else type(anchor).__name__
            raise ValueError(f"anchor: expected a Tensor of shape {expected}, got {came}")
        return anchor

    def see_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return self._tap(layer, output)
        tapped = self._tap(layer, output[0])
        return None if tapped is None else (tapped, *output[1:])

    def _tap(self, layer: int, hidden: Tensor) -> Tensor | None:
        head, current, config = self._pre.heads[layer], self._pass, self._pre.config
        if current is None:
            # A checkpointed layer that backward runs again: bring back the tap's saved tensors,
            # and nothing else; the first run has counted the loss.
            if not torch.is_grad_enabled():
                return None
            nothing = hidden.new_zeros(0, dtype=torch.long)
            anchor = hidden.new_zeros(0, config.anchor_width(hidden.shape[-1]))
            return head.tap(hidden, anchor, visual_index=nothing)[0]
        if current.anchor is None:
            raise RuntimeError(
                f"PRe: layer {layer} runs, but the language model, "
                f"{self._pre.family.language_model!r}, has not been called with inputs_embeds"
            )
        index, anchor = current.index.to(hidden.device), current.anchor.to(hidden.device)
        options = {"visual_index": index, "loss": config.loss, "normalize": config.normalize}
        value = torch.zeros((), dtype=torch.float32, device=hidden.device)
        current.values[layer] = value
        if not current.training:
            with torch.no_grad():
                value.copy_(head(hidden, anchor, **options))
            return None
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"PRe: layer {layer} runs without grad in a training step, as gradient "
                "checkpointing does with use_reentrant=True; expected use_reentrant=False "
                "(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        denominator = current.denominator
        if isinstance(denominator, Tensor):
            denominator = denominator.to(hidden.device)
        tapped, current.losses[layer] = head.tap(
            hidden,
            anchor,
            denominator=denominator,
            compute_value=config.value_in_forward,
            value_out=value,
            **options,
        )
        if config.value_in_forward:
            value.copy_(current.losses[layer].detach())
        return tapped

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current, self._pass = self._pass, None
        if current is None or output is None:  # the forward raised
            return None
        tokens = torch.tensor(float(current.index.numel()), device=current.index.device)
        is_tuple = isinstance(output, tuple)
        lm_loss = None
        if current.inputs.get("labels") is not None:
            lm_loss = output[0] if is_tuple else output.loss
        if current.training or current.index.numel():  # generation goes on without visual tokens
            detached = None if lm_loss is None else lm_loss.detach().clone()
            self._pre.last = Record(tokens, current.denominator, detached, current.values)
        if not current.training:
            return None
        values = [value.to(tokens.device) for value in current.losses.values()]
        term = torch.stack(values).mean() * self._pre.config.weight * self._label_share(current)
        if lm_loss is None or not self._pre.add_to_loss:
            self._pre.loss = term
            return None
        total = lm_loss + term.to(lm_loss.device)
        if is_tuple:
            return (total, *output[1:])
        output.loss = total
        return output

    def _label_share(self, current: _Pass) -> float | Tensor:
        """This micro-batch's share of the step's label tokens.

        Where the caller gives the step's count (transformers' Trainer does under gradient
        accumulation, and then does not divide the loss), L_LM is a share of the step's mean: so
        must L_PRe be. `denominator` makes this exact, and the share is then not needed.
        """
        items = current.inputs.get("num_items_in_batch")
        labels = current.inputs.get("labels")
        if items is None or labels is None or current.denominator is not None:
            return 1.0
        return (labels[..., 1:] != -100).sum() / items
