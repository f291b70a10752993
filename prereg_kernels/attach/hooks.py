"""The hooks of a forward pass of a model with PRe attached.

The model's call begins a forward pass and notes the visual tokens; the projector's call shows what
the vision encoder made of them, where that is the anchor; the language model's call shows its input
embeddings, where they are; each regularised decoder layer's output goes through the tap; the
model's result gets the term added to its loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels._util import distributed, private
from prereg_kernels.attach.anchors import llm_width
from prereg_kernels.attach.checkpointing import (
    is_recomputation,
    outside_checkpoint,
    outside_selection,
)
from prereg_kernels.attach.entry import Entry, check_sequence
from prereg_kernels.attach.forward import goes_on, parameters_of
from prereg_kernels.attach.identity import carry_along, use
from prereg_kernels.attach.image_spans import find_images
from prereg_kernels.attach.passes import Calls, Collected, Pass
from prereg_kernels.attach.pooling import pool_images
from prereg_kernels.attach.sampling import choose_tokens
from prereg_kernels.attach.state import State
from prereg_kernels.attach.terms import add_to_loss, carry_in, carry_of, label_share, record_of
from prereg_kernels.attach.visual import find_visible
from prereg_kernels.attach.watch import Watch


class Hooks:
    """In the order in which a forward pass meets them."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._calls, self._watch = Calls(), Watch(state)
        self._entry = Entry(state, self._calls)
        self._enters_at = state.family.entry_of(state.model)
        config = state.config
        settings = (config.anchor, config.level, config.token_fraction)
        self._reads_batch = settings == ("pre_llm", "patch", 1)
        embeddings = state.model.get_input_embeddings()
        self._compiled_values = _zeros(state.heads, embeddings.weight.device)
        self._width = llm_width(state.model)
        language_model = state.family.language_model_of(state.model)
        self._names = (
            parameters_of(state.model),
            parameters_of(language_model),
        )  # a graph cannot ask
        self._move_compiled_values = _outside_of_graphs(_move)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the calls that run are this one's."""
        state = dict(vars(self))
        del state["_calls"], state["_move_compiled_values"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._calls, self._move_compiled_values = Calls(), _outside_of_graphs(_move)
        self._entry.calls = self._calls

    @property
    def model(self) -> Any:
        """The one that PRe is, or was, attached to."""
        return self._state.model

    @property
    def is_attached(self) -> bool:
        """Whether PRe is still."""
        return self._state.is_attached

    @property
    def _pass(self) -> Pass | None:
        call = self._calls.current
        return None if call is None else call.current

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._calls.enter(model)
        call.current = self._read(model, self._named(0, model, args) | kwargs)

    def claim(self) -> bool:
        """Whether a hook has begun the call whose `forward` this is."""
        call = self._calls.current
        if call is None or call.owner is not self.model or call.is_claimed:
            return False
        call.is_claimed = True
        return True

    def begin_inside(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of a call that goes past the model, to its part that takes `input_ids`."""
        if torch.compiler.is_compiling() or self._calls.current is not None:
            return
        inputs = self._named(None, inner, args) | kwargs
        if inputs.get("input_ids") is not None or self._state.next_mask.mask is not None:
            call = self._calls.enter(inner)
            call.current = self._read(inner, inputs)

    def _named(self, known: int | None, module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
        if not args:
            return {}
        ask = known is None or not torch.compiler.is_compiling()
        names = parameters_of(module) if ask or known is None else self._names[known]
        return dict(zip(names, args, strict=False))

    def _read(self, module: nn.Module, inputs: dict[str, Any]) -> Pass | None:
        state, config = self._state, self._state.config
        if getattr(module, private.IS_REPLICA, False):
            raise ValueError(
                "model: expected the model that PRe is attached to, got a replica of "
                "torch.nn.DataParallel, whose threads share the hooks of one; use "
                "DistributedDataParallel, a process per GPU"
            )
        next_mask = state.next_mask
        given = None
        if next_mask.mask is not None or next_mask.kept:
            given = next_mask.take(inputs, module.training)
        training = module.training and torch.is_grad_enabled()
        compiled = torch.compiler.is_compiling()
        if not training and not config.value_in_eval and not state.is_checking:
            return None
        again = training and not compiled and is_recomputation()
        if training and not again:
            state.check_heads_train()
            if not compiled:
                self._watch.training()
            state.loss = state.last = None
        if not training and goes_on(inputs):
            return None
        attention = inputs.get("attention_mask")
        source = "input_ids" if given is None else "next_visual_mask"
        if given is not None:
            marked = given
        else:
            inputs = state.completed(inputs)
            marked = state.family.marked(state.model, inputs)
            if state.family.visual_mask is not None:
                source = "family.visual_mask"
        # Without ids each run of visual tokens stands for an image's, as one of ids does
        ids: Tensor = inputs["input_ids"] if source == "input_ids" else marked
        visible = find_visible(attention, marked)
        mask = marked if visible is None else marked & visible
        values = (
            self._values_in_graph(mask.device) if compiled else _zeros(state.heads, mask.device)
        )
        denominator = state.denominator if training else None  # of a training step
        if compiled and self._reads_batch:  # an index, of a size to be found out, breaks the graph
            if not isinstance(denominator, Tensor) and denominator == 0:  # fine without images
                denominator = mask.new_zeros((), dtype=torch.float32)
            current = Pass(inputs, source, mask.shape, training, denominator, mask, values)
            current.carry = carry_of(state, current) if training else None
            return current
        index = mask.flatten().nonzero().squeeze(1)
        if not index.numel():  # the term is 0, whatever it is divided by
            denominator = None
        current = Pass(inputs, source, mask.shape, training, denominator, index, values, again)
        if visible is not None:
            current.by_id = marked
        if config.level == "global":
            current.images = find_images(state.family, inputs, ids, marked, index)
        if training:
            if config.token_fraction < 1:
                current.chosen = self._choose(index)
            current.carry = carry_of(state, current)
            state.passes += not again
        if not compiled and ((training and not again) or state.is_checking):
            self._entry.first_steps.begin(current)
        return current

    def _values_in_graph(self, device: torch.device) -> dict[int, Tensor]:
        """The same in each pass: a graph's backward can write into the graph's inputs alone."""
        if any(value.device != device for value in self._compiled_values.values()):
            self._move_compiled_values(self._compiled_values, device)
        return dict(self._compiled_values)

    def _choose(self, index: Tensor) -> Tensor:
        state = self._state
        # Ranks that share a batch draw the same.
        address = (
            state.config.seed,
            distributed.rank() // distributed.copies(state.model),
            state.passes,
        )
        return choose_tokens(index.numel(), state.config.token_fraction, address, index.device)

    def see_projector(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        current = self._pass
        if current is not None:
            current.encoded.append((args or tuple(kwargs.values()))[0].detach())

    def see_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        current = self._pass
        embeddings = (self._named(1, module, args) | kwargs).get("inputs_embeds")
        if current is None:
            return
        if embeddings is not None:
            check_sequence(current, embeddings)
        if self._enters_at is not None:
            return
        if embeddings is not None:
            self._entry.take(current, embeddings, True)
        elif not torch.compiler.is_compiling():  # features are merged in the decoder's own forward
            self._enters_at = 0
            self.watch_entry()

    def watch_entry(self) -> None:
        """Where the decoder's layers are the first to see the visual features."""
        if self._enters_at is not None:
            layer = self._state.family.layers_of(self._state.model)[self._enters_at]
            hook = layer.register_forward_pre_hook(self.see_entry, with_kwargs=True)
            self._state.hooks.append(hook)

    def see_entry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = self._pass
        if current is None or current.anchor is not None:
            return
        states = args[0] if args else kwargs["hidden_states"]
        states = self._state.family.states_of(states, self._width)
        check_sequence(current, states)
        self._entry.take(current, states, not self._enters_at)

    def see_layer(
        self, layer: int, is_next_input: bool, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        hidden = self._state.family.states_of(output, self._width)
        compiled, current = torch.compiler.is_compiling(), self._pass
        if not compiled and self._calls.current is None:
            self._watch.bypassed(layer, module)
        # The next layer's checkpoint holds its input, this output: saved beside it, it is held
        # once, and this layer's recomputation need not go to its end to bring it back.
        is_held = is_next_input and getattr(module, "gradient_checkpointing", False)
        is_global = self._state.config.level == "global"
        with (
            outside_checkpoint() if is_held and not is_global else nullcontext(),
            nullcontext() if compiled else outside_selection(),
        ):
            tapped = (self._pool if is_global else self._tap)(layer, hidden)
        if tapped is not None and current is not None:
            self._watch.gradient(tapped, current)
        if tapped is not None and hidden is not whole:  # one stream of several
            tapped = carry_along(whole, tapped)
        if tapped is None or not isinstance(output, tuple):
            return tapped
        return (tapped, *output[1:])

    def _pool(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Keep the images' means for `end`: small, and outside of what is checkpointed."""
        current = self._pass
        if current is None:  # a checkpointed layer that backward runs again: nothing is saved in it
            return None
        self._check(layer, current, hidden)
        assert current.images is not None
        of_token, index = (x.to(hidden.device) for x in (current.images.of_token, current.index))
        with torch.set_grad_enabled(current.training):
            current.pooled[layer] = pool_images(hidden, of_token, current.images.count, index=index)
        return use(hidden, *self._state.module_of(layer).parameters()) if current.training else None

    def _tap(self, layer: int, hidden: Tensor) -> Tensor | None:
        head, current = self._state.module_of(layer), self._pass
        if current is None:
            # A checkpointed layer that backward runs again: bring back the tap's saved tensors,
            # and nothing else; the first run has counted the loss.
            if not torch.is_grad_enabled():
                return None
            nothing = hidden.new_zeros(0, dtype=torch.long)
            anchor = hidden.new_zeros(0, self._state.anchor_features)
            return head(hidden, anchor, tap=True, visual_index=nothing)[0]
        self._check(layer, current, hidden)
        index = current.index if current.chosen is None else current.index[current.chosen]
        return self._loss(layer, current, hidden, index.to(hidden.device))

    def _check(self, layer: int, current: Pass, hidden: Tensor) -> None:
        if current.anchor is None:
            raise RuntimeError(
                f"PRe: layer {layer} runs, but the language model, "
                f"{self._state.family.language_model!r}, has not been called with inputs_embeds"
            )
        if hidden.shape != (*current.shape, self._width):
            raise ValueError(
                f"family.streams: layer {layer}, a "
                f"{type(self._state.family.layers_of(self._state.model)[layer - 1]).__name__}, "
                f"returns {tuple(hidden.shape)}; expected (rows, length, D), "
                f"{(*current.shape, self._width)}. Of several residual streams, say which PRe "
                "reads: family=Family(..., streams=function), from that output and D"
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
        head, config = self._state.module_of(layer), self._state.config
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
            # the sum over the chosen, each in place of so many (prereg_kernels.attach.sampling)
            denominator = denominator * (current.chosen.numel() / current.index.numel())
        tapped, current.losses[layer] = head(
            hidden,
            anchor,
            tap=True,
            denominator=denominator,
            compute_value=config.value_in_forward,
            value_out=value,
            carry=current.carry,
            carry_always=current.carry is not None and config.gradient == "tap",
            **options,
        )
        if config.value_in_forward:
            value.copy_(current.losses[layer].detach())
        return tapped

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state, current = self._state, self._calls.leave(module)
        if current is not None and current.embedding_hook is not None:
            current.embedding_hook.remove()
        if output is None:  # the forward raised
            return None
        if not torch.compiler.is_compiling():
            self._watch.evaluated(module, output)
        if current is None:
            return None
        pooled = [self._loss(layer, current, x, None) for layer, x in current.pooled.items()]
        record = record_of(current, output)
        if not current.again:
            state.last = record
        if not current.training:
            if state.collected is not None:
                state.collected.append(Collected(None, record))
            return None
        if len(current.losses) < len(state.heads):
            raise RuntimeError(
                f"PRe: expected the layers {list(state.heads)} to run, got {list(current.losses)}. "
                "torch.compile leaves out hooks that came after it, so attach PRe before the first "
                "call; and those of checkpointed layers: there, compile the other layers alone, "
                "each by layer.compile(), or train without checkpointing"
            )
        if current.carry is not None:
            output = carry_in(output, [x for x in pooled if x is not None])
        if current.carry is not None and state.config.gradient == "tap":
            return output
        values = [value.to(record.tokens.device) for value in current.losses.values()]
        term = torch.stack(values).mean() * state.config.weight * label_share(current)
        self._watch.term(term, current)
        if state.collected is not None:
            if not current.again:
                state.collected.append(Collected(term, record))
            return output
        if current.inputs.get("labels") is None or not state.add_to_loss:
            if not current.again:
                state.loss = term
            return output
        return add_to_loss(output, term)


def _zeros(layers: Iterable[int], device: torch.device) -> dict[int, Tensor]:
    """{layer: 0-dim, float32}"""
    return {layer: torch.zeros((), dtype=torch.float32, device=device) for layer in layers}


def _move(values: dict[int, Tensor], device: torch.device) -> None:
    with torch.inference_mode(False):  # backward of training will write into them
        values.update(_zeros(list(values), device))


def _outside_of_graphs(function: Any) -> Any:
    """Not a decorator: it would load the compiler with the package."""
    return torch.compiler.disable(function)
