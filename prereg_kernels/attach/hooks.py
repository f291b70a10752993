# SPDX-License-Identifier: Apache-2.0
"""Hooks: what happens in a forward pass of a model with PRe attached, in this order.

1. The model's call begins a pass and notes the visual tokens.
2. The projector's call has the vision encoder's output, if that is the anchor.
3. The language model's call has the input embeddings, if they are the anchor.
4. The output of each regularised decoder layer goes through the tap.
5. The term is added to the loss in the model's result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels._util import private
from prereg_kernels.attach.checkpointing import (
    is_recomputation,
)
from prereg_kernels.attach.entry import Entry
from prereg_kernels.attach.forward import goes_on, parameters_of, was_encoded
from prereg_kernels.attach.image_spans import find_images
from prereg_kernels.attach.passes import Calls, Collected, Pass, zeros
from prereg_kernels.attach.sampling import choose_tokens
from prereg_kernels.attach.sequence_parallel import Part, SequenceParallel
from prereg_kernels.attach.state import State
from prereg_kernels.attach.taps import Taps
from prereg_kernels.attach.terms import add_to_loss, carry_in, carry_of, label_share, record_of
from prereg_kernels.attach.visual import hide
from prereg_kernels.attach.watch import Watch
from prereg_kernels.ops.probe import TapProbe
from prereg_kernels.ops.shares import share_of


class Hooks:
    """The hooks, in the order in which a forward pass meets them."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._calls, self._watch = Calls(), Watch(state)
        self._entry = Entry(state, self._calls)
        self.taps = Taps(state, self._calls, self._watch)
        config = state.config
        settings = (config.anchor, config.level, config.token_fraction)
        self._reads_batch = settings == ("pre_llm", "patch", 1)
        self._reads_images = config.anchor != "pre_llm" or config.level == "global"
        embeddings = state.family.embeddings_of(state.model)
        self._compiled_values = _lasting(state.heads, next(embeddings.parameters()).device)
        language_model = state.family.language_model_of(state.model)
        self._names = (
            parameters_of(state.model),
            parameters_of(language_model),
        )  # a graph cannot ask
        self._move_compiled_values = _outside_of_graphs(_move)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot hold a disabled function."""
        state = dict(vars(self))
        del state["_move_compiled_values"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._move_compiled_values = _outside_of_graphs(_move)

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
        """Begin a pass for a call that bypasses the model and goes to its part with `input_ids`."""
        if torch.compiler.is_compiling():
            return
        call = self._calls.current
        while call is not None and call.owner is inner:  # Ctrl-C ended it without its hook
            self.end(inner, args, None)
            call = self._calls.current
        if call is not None:
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
        encoded: list[Tensor] = []  # before the call
        if state.encoded:
            encoded, state.encoded = state.encoded, []
            if inputs.get("input_ids") is not None:  # this call encodes its own
                encoded = []
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
        if not training and (goes_on(inputs) or (self._reads_images and was_encoded(inputs))):
            return None
        attention = inputs.get("attention_mask")
        source = "input_ids" if given is None else "next_visual_mask"
        if given is not None:
            marked, mask = given, hide(given, attention)
        else:
            inputs = state.completed(inputs)
            marked = state.family.marked(state.model, inputs)
            mask = state.family.shown(marked, attention)
            if state.family.visual_mask is not None:
                source = "family.visual_mask"
        # Without ids each run of visual tokens stands for an image's, as one of ids does
        ids: Tensor = inputs["input_ids"] if source == "input_ids" else marked
        values = self._values_in_graph(mask.device) if compiled else zeros(state.heads, mask.device)
        shared = state.sequence_parallel
        in_graph = compiled and self._reads_batch  # an index, of a size to be found out, breaks it
        part = None
        if shared is not None and shared.shard is not None:
            part = shared.part_of(mask, in_graph=in_graph)
        denominator = state.denominator if training else None  # of a training step
        if in_graph:
            if not isinstance(denominator, Tensor) and denominator == 0:  # fine without images
                denominator = mask.new_zeros((), dtype=torch.float32)
            if training and denominator is None and shared is not None:
                denominator = _over_ranks(shared, mask.sum(), part)
            current = Pass(inputs, source, mask.shape, training, denominator, mask, values)
            current.part, current.first_label = part, state.first_label
            current.carry = carry_of(state, current) if training else None
            return current
        index = mask.flatten().nonzero().squeeze(1)
        images = None
        if config.level == "global":
            images = find_images(state.family, inputs, ids, marked, index)
            if shared is not None and part is None:
                raise ValueError(
                    "level: 'global' needs to know where images are cut, and this rank's part of "
                    "the sequences does not say; expected SequenceParallel(group, shard=...), and "
                    "calls with whole rows, or level='patch'"
                )
        if training and denominator is None and shared is not None:
            rows = index.numel() if images is None else images.count
            denominator = _over_ranks(shared, torch.tensor(float(rows), device=index.device), part)
        if not index.numel():  # the term is 0, whatever it is divided by
            denominator = None
        current = Pass(inputs, source, mask.shape, training, denominator, index, values)
        current.again, current.first_label = again, state.first_label
        current.images, current.part, current.encoded = images, part, encoded
        if images is not None and shared is not None:
            current.image_rows = share_of(images.count, shared.group)
        if mask is not marked:
            current.by_id = marked
        if training:
            if config.token_fraction < 1:
                current.chosen = self._choose(current.own_index)
            self._weigh(current)
            current.carry = carry_of(state, current)
            state.passes += not again
        if not compiled and ((training and not again) or state.is_checking):
            self._entry.first_steps.begin(current)
        return current

    def _weigh(self, current: Pass) -> None:
        """Compute nothing for a weight of 0; otherwise give each watched layer a probe."""
        state = self._state
        if state.config.level != "patch" or torch.compiler.is_compiling():
            return
        if not isinstance(state.weight, Tensor) and not state.weight:
            current.is_idle = True
            current.chosen, current.denominator = current.own_index[:0], None
        elif state.watches_gradients and not current.again:
            current.probes = {layer: TapProbe() for layer in state.heads}

    def _values_in_graph(self, device: torch.device) -> dict[int, Tensor]:
        """The same tensors in each pass, because a graph can write only into its inputs."""
        if any(value.device != device for value in self._compiled_values.values()):
            self._move_compiled_values(self._compiled_values, device)
        return dict(self._compiled_values)

    def _choose(self, index: Tensor) -> Tensor:
        state = self._state
        # Ranks that share a batch draw the same.
        address = state.config.seed, state.replica, state.passes
        return choose_tokens(index.numel(), state.config.token_fraction, address, index.device)

    def see_projector(self, states: Tensor) -> None:
        call, state = self._calls.current, self._state
        if call is None and state.batch is not None:  # in a trainer's hook, before its call
            state.encoded.append(states.detach())
        elif call is not None and call.current is not None:
            call.current.encoded.append(states.detach())

    def see_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        current = self._pass
        embeddings = (self._named(1, module, args) | kwargs).get("inputs_embeds")
        if current is not None:
            self._entry.see(current, embeddings)

    def watch_entry(self) -> None:
        """Watch the first decoder layer that sees the visual features, if the family names one."""
        entry = self._state.family.entry_of(self._state.model)
        if entry is not None:
            self._entry.watch(entry)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state, current = self._state, self._calls.leave(module)
        if current is not None and not torch.compiler.is_compiling():
            self._entry.first_steps.end(current, output is not None)
        if output is None:  # the forward raised
            return None
        if not torch.compiler.is_compiling():
            self._watch.evaluated(module, output)
        if current is None:
            return None
        pooled = [
            self.taps.loss(layer, current, x, _image_index(current, x))
            for layer, x in current.pooled.items()
        ]
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
                f"Either {state.family.layers!r} are not the decoder's layers, or some are on "
                f"another stage of a pipeline, which PRe cannot span, or torch.compile "
                "has left out hooks that came after it, so attach PRe before the first "
                "call; and those of checkpointed layers: there, compile the layers one by one, "
                "each by layer.compile(), or train without checkpointing"
            )
        if current.carry is not None:
            self._watch.carried(current)
            output = carry_in(output, [*(x for x in pooled if x is not None), *current.left])
        if current.carry is not None and state.config.gradient == "tap":
            return output
        values = [value.to(record.tokens.device) for value in current.losses.values()]
        weight = state.weight
        if isinstance(weight, Tensor):
            weight = weight.to(record.tokens.device)
        term = torch.stack(values).mean() * weight * label_share(current)
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


def _over_ranks(shared: SequenceParallel, rows: Tensor, part: Part | None) -> Tensor:
    """The denominator of a pass without one: the mean over the sequences that ranks share.

    Args:
        rows: 0-dim, those of the whole, or, where the call has no more, of this rank's part.
    """
    count = rows if part is not None else shared.total(rows)
    return shared.denominator(count.clamp(min=1))


def _image_index(current: Pass, pooled: Tensor) -> Tensor | None:
    """Which images' means this rank computes the loss of. None: all."""
    mine = current.image_rows
    return None if mine is None else torch.arange(mine.start, mine.stop, device=pooled.device)


def _move(values: dict[int, Tensor], device: torch.device) -> None:
    with torch.inference_mode(False):  # backward of training will write into them
        values.update(_lasting(list(values), device))


def _lasting(layers: Iterable[int], device: torch.device) -> dict[int, Tensor]:
    """Values with a fixed address: a CUDA graph that wrote to others would not be captured."""
    values = zeros(layers, device)
    for value in values.values():
        private.keep_address(value)
    return values


def _outside_of_graphs(function: Any) -> Any:
    """Disable the compiler for a function. As a decorator this would load it with the package."""
    return torch.compiler.disable(function)
