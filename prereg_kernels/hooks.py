"""The hooks of a forward pass of a model with PRe attached.

The model's call begins a forward pass and notes the visual tokens; the projector's call shows what
the vision encoder made of them, where that is the anchor; the language model's call shows its input
embeddings, where they are; each regularised decoder layer's output goes through the tap; the
model's result gets the term added to its loss.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels import distributed
from prereg_kernels.anchors import function_rows, projector_rows
from prereg_kernels.checkpointing import outside_checkpoint
from prereg_kernels.handle import PRe, Record
from prereg_kernels.images import find_images
from prereg_kernels.passes import Pass
from prereg_kernels.pooling import pool_images
from prereg_kernels.sampling import choose_tokens


def attach_hooks(pre: PRe) -> None:
    """Put the hooks on `pre.model`; `pre.detach` removes them."""
    model, family, hooks = pre.model, pre.family, _Hooks(pre)
    language_model, layers = family.language_model_of(model), family.layers_of(model)
    pre.hooks += [
        model.register_forward_pre_hook(hooks.begin, with_kwargs=True),
        language_model.register_forward_pre_hook(hooks.see_embeddings, with_kwargs=True),
        model.register_forward_hook(hooks.end, always_call=True),
    ]
    if pre.config.anchor == "pre_projector":
        projector = family.projector_of(model)
        hook = projector.register_forward_pre_hook(hooks.see_projector, with_kwargs=True)
        pre.hooks.append(hook)
    for number in pre.heads:
        see = partial(hooks.see_layer, number, _is_next_input(model, number, len(layers)))
        pre.hooks.append(layers[number - 1].register_forward_hook(see))


def _is_next_input(model: nn.Module, layer: int, layers: int) -> bool:
    """Whether this layer's output, as it is, is the input of the next layer."""
    vision: Any = getattr(getattr(model, "config", None), "vision_config", None)
    # Qwen3-VL adds features to copies of the first outputs
    added = getattr(vision, "deepstack_visual_indexes", None) or ()
    return len(added) < layer < layers


class _Hooks:
    """In the order in which a forward pass meets them."""

    def __init__(self, pre: PRe) -> None:
        language_model = pre.family.language_model_of(pre.model)
        self._pre = pre
        self._pass: Pass | None = None  # while the model's forward runs
        self._arguments = tuple(inspect.signature(pre.model.forward).parameters)
        self._decoder_arguments = tuple(inspect.signature(language_model.forward).parameters)
        self._saw_finite_anchor = self._has_warned = False
        config = pre.config
        settings = (config.anchor, config.level, config.token_fraction)
        self._reads_batch = settings == ("pre_llm", "patch", 1)
        embeddings = pre.model.get_input_embeddings()
        self._compiled_values = _zeros(pre.heads, embeddings.weight.device)
        # Not a decorator: it would load the compiler with the package
        self._move_compiled_values = torch.compiler.disable(self._renew_compiled_values)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pre, config = self._pre, self._pre.config
        if getattr(model, "_is_replica", False):
            raise ValueError(
                "model: expected the model that PRe is attached to, got a replica of "
                "torch.nn.DataParallel, whose threads share the hooks of one; use "
                "DistributedDataParallel, a process per GPU"
            )
        training = model.training and torch.is_grad_enabled()
        self._pass = None
        if not training and not config.value_in_eval:
            return
        compiled = torch.compiler.is_compiling()
        again = training and not compiled and _is_recomputation()
        if training and not again:
            pre.check_heads_train()
            if not compiled:
                self._warn_of_an_unused_term()
            pre.loss = pre.last = None
        inputs = dict(zip(self._arguments, args, strict=False)) | kwargs
        if not training and _goes_on(inputs):
            return
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise ValueError("input_ids: PRe finds the visual tokens by it; expected ids, got None")
        mask = pre.visual_mask(input_ids)
        values = self._values_in_graph(mask.device) if compiled else _zeros(pre.heads, mask.device)
        denominator = pre.denominator if training else None  # of a training step
        if compiled and self._reads_batch:  # an index, of a size to be found out, breaks the graph
            if not isinstance(denominator, Tensor) and denominator == 0:  # fine without images
                denominator = mask.new_zeros((), dtype=torch.float32)
            self._pass = Pass(inputs, training, denominator, mask, values)
            return
        index = mask.flatten().nonzero().squeeze(1)
        if not index.numel():  # the term is 0, whatever it is divided by
            denominator = None
        current = Pass(inputs, training, denominator, index, values, again)
        if config.level == "global":
            current.images = find_images(pre.family, inputs, input_ids, index)
        if training:
            if config.token_fraction < 1:
                current.chosen = self._choose(index)
            pre.passes += not again
        self._pass = current

    def _warn_of_an_unused_term(self) -> None:
        last = self._pre.last
        if last is None or last.reached != {"layer"} or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            "PRe: the last backward pass came from a loss without the term, so the heads do not "
            "train. Such a loss is computed elsewhere than in the model, as TRL's SFTTrainer does, "
            "or the model got no labels: pass labels and use the loss that the model returns; or "
            "set pre.add_to_loss = False, and after each call of the model add pre.loss to yours, "
            "as prereg_kernels.trainer.PreTrainerMixin does for a Trainer",
            stacklevel=2,
        )

    def _values_in_graph(self, device: torch.device) -> dict[int, Tensor]:
        """The same in each pass: a graph's backward can write into the graph's inputs alone."""
        if any(value.device != device for value in self._compiled_values.values()):
            self._move_compiled_values(device)
        return dict(self._compiled_values)

    def _renew_compiled_values(self, device: torch.device) -> None:
        self._compiled_values = _zeros(self._pre.heads, device)

    def _choose(self, index: Tensor) -> Tensor:
        pre = self._pre
        # Ranks that share a batch, as under tensor parallelism, draw the same.
        copies = getattr(pre.model, "tp_size", None) or 1
        address = (pre.config.seed, distributed.rank() // copies, pre.passes)
        return choose_tokens(index.numel(), pre.config.token_fraction, address, index.device)

    def see_projector(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._pass is not None:
            self._pass.encoded.append((args or tuple(kwargs.values()))[0].detach())

    def see_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        current = self._pass
        inputs = dict(zip(self._decoder_arguments, args, strict=False)) | kwargs
        embeddings = inputs.get("inputs_embeds")
        if current is None or embeddings is None:
            return
        with torch.no_grad():
            current.anchor = self._anchor(current, embeddings.detach())

    def _anchor(self, current: Pass, embeddings: Tensor) -> Tensor:
        """For each row that L_PRe reads, or, for what entered the LLM, of the whole batch."""
        pre, source, images = self._pre, self._pre.config.anchor, current.images
        tokens, width = current.index.numel(), pre.anchor_features
        count = None if images is None else images.count
        if source == "pre_llm":
            if images is None:
                return embeddings
            return pool_images(embeddings, images.of_token, images.count, index=current.index)
        if callable(source):
            self._pass = None  # the function may call parts of the model
            rows = function_rows(
                source(current.inputs), tokens, count, width,
                current.index.device, finite=not self._saw_finite_anchor,
            )  # fmt: skip
            self._pass = current
            self._saw_finite_anchor |= tokens > 0
        else:
            rows = projector_rows(current.encoded, tokens, width, pre.family, embeddings)
            current.encoded.clear()
        if images is not None:
            is_pooled = rows.shape[0] == images.count
            return rows if is_pooled else pool_images(rows, images.of_token, images.count)
        return rows if current.chosen is None else rows[current.chosen.to(rows.device)]

    def see_layer(
        self, layer: int, is_next_input: bool, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if self._pre.config.level == "global":
            tapped = self._pool(layer, hidden)
        else:
            # The next layer's checkpoint holds its input, this output: saved beside it, it is held
            # once, and this layer's recomputation need not go to its end to bring it back.
            is_held = is_next_input and getattr(module, "gradient_checkpointing", False)
            with outside_checkpoint() if is_held else nullcontext():
                tapped = self._tap(layer, hidden)
        current = self._pass
        if tapped is not None and current is not None:
            _note(tapped, current.reached, "layer")
        if tapped is None or not isinstance(output, tuple):
            return tapped
        return (tapped, *output[1:])

    def _pool(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Keep the images' means for `end`: small, and outside of what is checkpointed."""
        current = self._pass
        if current is None:  # a checkpointed layer that backward runs again: nothing is saved in it
            return None
        self._check(layer, current)
        assert current.images is not None
        of_token, index = (x.to(hidden.device) for x in (current.images.of_token, current.index))
        with torch.set_grad_enabled(current.training):
            current.pooled[layer] = pool_images(hidden, of_token, current.images.count, index=index)
        if not current.training:
            return None
        return _Use.apply(hidden, *self._pre.heads[layer].parameters())

    def _tap(self, layer: int, hidden: Tensor) -> Tensor | None:
        head, current = self._pre.module_of(layer), self._pass
        if current is None:
            # A checkpointed layer that backward runs again: bring back the tap's saved tensors,
            # and nothing else; the first run has counted the loss.
            if not torch.is_grad_enabled():
                return None
            nothing = hidden.new_zeros(0, dtype=torch.long)
            anchor = hidden.new_zeros(0, self._pre.anchor_features)
            return head(hidden, anchor, tap=True, visual_index=nothing)[0]
        self._check(layer, current)
        index = current.index if current.chosen is None else current.index[current.chosen]
        return self._loss(layer, current, hidden, index.to(hidden.device))

    def _check(self, layer: int, current: Pass) -> None:
        if current.anchor is None:
            raise RuntimeError(
                f"PRe: layer {layer} runs, but the language model, "
                f"{self._pre.family.language_model!r}, has not been called with inputs_embeds"
            )
        if current.training and not torch.is_grad_enabled():
            raise RuntimeError(
                f"PRe: layer {layer} runs without grad in a training step, as gradient "
                "checkpointing does with use_reentrant=True; expected use_reentrant=False "
                "(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )

    def _loss(
        self, layer: int, current: Pass, hidden: Tensor, index: Tensor | None
    ) -> Tensor | None:
        """The layer's loss, into `current`; in training, returns the tapped `hidden`."""
        head, config = self._pre.module_of(layer), self._pre.config
        assert current.anchor is not None
        anchor = current.anchor.to(hidden.device)
        options: dict[str, Any] = {"loss": config.loss, "normalize": config.normalize}
        is_mask = index is not None and index.dtype == torch.bool
        options["visual_mask" if is_mask else "visual_index"] = index
        if current.values[layer].device != hidden.device:  # a model on several devices
            current.values |= _zeros((layer,), hidden.device)
        value = current.values[layer]
        if not current.training:
            with torch.no_grad():
                value.copy_(head(hidden, anchor, **options))
            return None
        denominator = current.denominator
        if isinstance(denominator, Tensor):
            denominator = denominator.to(hidden.device)
        if denominator is not None and current.chosen is not None:
            # the sum over the chosen, each in place of so many (prereg_kernels.sampling)
            denominator = denominator * (current.chosen.numel() / current.index.numel())
        tapped, current.losses[layer] = head(
            hidden,
            anchor,
            tap=True,
            denominator=denominator,
            compute_value=config.value_in_forward,
            value_out=value,
            **options,
        )
        if config.value_in_forward:
            value.copy_(current.losses[layer].detach())
        return tapped

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        pre, current, self._pass = self._pre, self._pass, None
        if current is None or output is None:  # the forward raised
            return None
        for layer, pooled in current.pooled.items():
            self._loss(layer, current, pooled, None)
        tokens = current.tokens
        rows = tokens if current.images is None else torch.full_like(tokens, current.images.count)
        is_tuple = isinstance(output, tuple)
        lm_loss = None
        if current.inputs.get("labels") is not None:
            lm_loss = output[0] if is_tuple else output.loss
        detached = None if lm_loss is None else lm_loss.detach().clone()
        if not current.again:
            pre.last = Record(
                tokens, rows, current.denominator, detached, current.values, current.reached
            )
        if not current.training:
            return None
        if len(current.losses) < len(pre.heads):
            raise RuntimeError(
                f"PRe: expected the layers {list(pre.heads)} to run, got {list(current.losses)}. "
                "torch.compile leaves out hooks that came after it, so attach PRe before the first "
                "call; and those of checkpointed layers: there, compile the other layers alone, "
                "each by layer.compile(), or train without checkpointing"
            )
        values = [value.to(tokens.device) for value in current.losses.values()]
        term = torch.stack(values).mean() * pre.config.weight * self._label_share(current)
        _note(term, current.reached, "term")
        if lm_loss is None or not pre.add_to_loss:
            if not current.again:
                pre.loss = term
            return None
        total = lm_loss + term.to(lm_loss.device)
        if is_tuple:
            return (total, *output[1:])
        output.loss = total
        return output

    def _label_share(self, current: Pass) -> float | Tensor:
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


def _zeros(layers: Iterable[int], device: torch.device) -> dict[int, Tensor]:
    """{layer: 0-dim, float32}"""
    return {layer: torch.zeros((), dtype=torch.float32, device=device) for layer in layers}


def _is_recomputation() -> bool:
    """Whether a checkpoint around the model's call runs it again in backward, for its graph.

    Not so with use_reentrant=True, where the call in backward is the first one with grad.
    """
    node = torch._C._current_autograd_node()
    return node is not None and node.name() != "CheckpointFunctionBackward"


def _note(x: Tensor, reached: set[str], name: str) -> None:
    """Once backward comes to `x`, `reached` has the name; not in a graph, which has no hooks."""
    if x.requires_grad and not torch.compiler.is_compiling():
        x.register_hook(lambda _: reached.add(name))


def _goes_on(inputs: Mapping[str, Any]) -> bool:
    """Whether these are tokens that generation appends: none is visual, whatever its id."""
    cache: Any = inputs.get("past_key_values")
    return hasattr(cache, "get_seq_length") and bool(cache.get_seq_length())


class _Use(torch.autograd.Function):
    """The identity on `hidden`, whose backward has no gradient for the parameters.

    DDP looks for what a step uses in the graph of what the model returns. The tap puts a head's
    parameters there; with level="global" nothing that is returned needs to depend on them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        same = hidden.view_as(hidden)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(same)
        return same

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (gradient, *[None] * ctx.parameters)
