# SPDX-License-Identifier: Apache-2.0
"""Pass and Record: what is known of a call of a model with PRe, while it runs and after it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prereg_kernels._util.private import version_of
from prereg_kernels.attach.image_spans import Images
from prereg_kernels.attach.sequence_parallel import Part
from prereg_kernels.ops.probe import TapProbe


@dataclass
class Pass:
    """What one forward pass of the model needs to remember. It is gone when the pass ends."""

    inputs: Mapping[str, Any]
    source: str  # what says where the visual tokens are: "input_ids", say,
    shape: torch.Size  # and its shape
    training: bool
    denominator: float | Tensor | None
    index: Tensor  # (N,) visual positions in the flattened batch; or, in a graph, the mask of them
    values: dict[int, Tensor]  # per layer, where its loss will be
    first_label: int = 1  # of a row, of those that the model's loss is of
    again: bool = False  # it has been counted, and backward brings back what its graph needs
    # What backward multiplies the gradient of a layer's loss by, where no loss holds the term
    carry: float | Tensor | None = None
    by_id: Tensor | None = None  # bool, where they are, hidden or not; None: all in `index`
    part: Part | None = None  # of the sequence, which this rank has; None: all of it
    chosen: Tensor | None = None  # (K,) of its own, by which L_PRe is estimated; None: all
    is_idle: bool = False  # the weight is 0: L_PRe is computed of nothing
    probes: dict[int, TapProbe] = field(default_factory=dict)  # per layer, where they are watched
    images: Images | None = None  # with level="global"
    image_rows: slice | None = None  # of them those of this rank; None: all
    encoded: list[Tensor] = field(default_factory=list)  # what entered the projector
    # (batch, positions, A), or a row for each of those that L_PRe reads
    anchor: Tensor | None = None
    pooled: dict[int, Tensor] = field(default_factory=dict)  # per layer, (images, D)
    losses: dict[int, Tensor] = field(default_factory=dict)  # per layer, 0-dim
    # What first runs without grad have left (prereg_kernels.attach.reentrant)
    left: list[Tensor] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)  # by backward, as Record has it
    embedded: list[Tensor] | None = None  # in the first steps, what the embedding module returned
    embedding_hook: RemovableHandle | None = None  # by which they come

    @property
    def own_shape(self) -> torch.Size:
        """The shape, (rows, length), of what goes through this rank's decoder layers."""
        return self.shape if self.part is None else self.part.shape

    @property
    def own_index(self) -> Tensor:
        """The visual positions in that, like `index`."""
        return self.index if self.part is None else self.part.index

    def own(self, rows: Tensor) -> Tensor:
        """The rows of this rank's visual tokens, out of the rows of all visual tokens."""
        return rows if self.part is None else rows[self.part.place.to(rows.device)]

    @property
    def tokens(self) -> Tensor:
        """The number of this rank's visual tokens: 0-dim, float32."""
        index = self.own_index
        if index.dtype == torch.bool:
            return index.sum(dtype=torch.float32)
        return torch.full((), float(index.numel()), device=index.device)

    @property
    def labels(self) -> Tensor | None:
        """The number of labels that the model predicts: 0-dim."""
        labels, shifted = self.inputs.get("labels"), self.inputs.get("shift_labels")
        if isinstance(shifted, Tensor) and labels is not None:  # those of a part of the sequence
            return (shifted != -100).sum()
        return None if labels is None else (labels[..., self.first_label :] != -100).sum()

    def kinds(self, ids: tuple[int, ...]) -> list[Tensor]:
        """For each of these ids that the batch has: where it is among its visual tokens.

        Returns:
            bool, (visual tokens, hidden or not,) each. None, if the batch has no ids.
        """
        given = self.inputs.get("input_ids")
        if given is None:
            return []
        marked = self.index if self.by_id is None else self.by_id.flatten()
        found = [given.flatten()[marked] == id for id in ids]
        return [kind for kind in found if kind.any()]

    def shown(self, rows: Tensor) -> Tensor:
        """The rows that attention shows, out of a row for each visual id or image of the batch."""
        tokens, images = self.index.numel(), self.images
        if self.by_id is not None and len(rows) not in (tokens, images and images.count):
            if images is not None and images.shown is not None and len(rows) == images.in_batch:
                return rows[images.shown.to(rows.device)]
            if len(rows) == int(self.by_id.sum()):
                place = self.by_id.flatten().cumsum(0)[self.index] - 1
                return rows[place.to(rows.device)]
        return rows


class Record(NamedTuple):
    """What `metrics` reads after a pass: a few numbers on the device, no graph, no batch."""

    training: bool
    is_carried: bool  # backward may add the term's gradient by itself
    tokens: Tensor  # visual tokens
    rows: Tensor  # what L_PRe is the mean over: these, or their images
    denominator: float | Tensor | None
    lm_loss: Tensor  # the mean over the labels,
    labels: Tensor  # and how many there are; 0: the model computed none
    values: dict[int, Tensor]  # written by backward
    reached: set[str]  # of "layer" and "term", what backward has come to
    probes: dict[int, TapProbe]  # of the layers, where they were watched
    fraction: float  # of the visual tokens, those that L_PRe was computed of
    is_idle: bool  # none, as its weight was 0

    def sums(self) -> list[Tensor]:
        """The sum of the loss over the rows, for each layer, 0-dim."""
        divisor = self.rows if self.denominator is None else self.denominator
        return [value.to(self.rows) * divisor for value in self.values.values()]

    def gradient_sums(self) -> Tensor | None:
        """The sums of `TapProbe`, (layers, 3), estimated for all tokens. None: not watched."""
        if not self.probes:
            return None
        nothing = self.tokens.new_zeros(3)
        found = [nothing if p.sums is None else p.sums.to(nothing) for p in self.probes.values()]
        sums = torch.stack(found)
        sums[:, 0] /= self.fraction
        sums[:, 1] *= self.fraction  # each of the drawn ones stands for 1 / fraction
        return sums

    def is_complete(self) -> bool:
        """Whether the values are there. In training, backward writes them."""
        return not self.training or all(version_of(value) for value in self.values.values())


class Collected(NamedTuple):
    """A pass through the model while `PRe.collecting` was open."""

    term: Tensor | None  # weighted, with its graph; None: an evaluating pass
    record: Record


@dataclass
class Call:
    """A call of the model, or of the part of it that takes `input_ids`."""

    owner: nn.Module | None
    outer: Call | None  # the call that this one is made in
    current: Pass | None = None  # None: it is not regularised
    is_claimed: bool = False  # `model.forward` has been reached


class Calls:
    """The calls that this thread is in. Each thread sees only its own calls of a model.

    The first thread's calls are in a plain attribute, because graphs of torch.compile keep up with
    nothing else: after a graph break they lose what they wrote into a threading.local. A graph
    cannot ask for its thread, so it takes the first thread's calls for its own.
    """

    def __init__(self) -> None:
        self._first: Call | None = None
        self._first_thread: int | None = None  # None: a graph wrote it
        self._others: dict[int, Call] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which do not take over the calls that run."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Calls.__init__(self)

    @property
    def current(self) -> Call | None:
        """The innermost call."""
        if torch.compiler.is_compiling():
            return self._first
        thread = threading.get_ident()
        is_first = thread not in self._others and self._first_thread in (None, thread)
        return self._first if is_first else self._others.get(thread)

    def _put(self, call: Call | None) -> None:
        if torch.compiler.is_compiling():
            self._first, self._first_thread = call, None
            return
        thread = threading.get_ident()
        with self._lock:
            is_free = self._first is None or self._first_thread in (None, thread)
            if thread not in self._others and is_free:
                self._first, self._first_thread = call, thread
            elif call is None:
                del self._others[thread]
            else:
                self._others[thread] = call

    def enter(self, owner: nn.Module | None) -> Call:
        """Begin one more call, the innermost."""
        call = Call(owner, self.current)
        self._put(call)
        return call

    def leave(self, owner: nn.Module | None) -> Pass | None:
        """End the innermost call, and return its pass, if the call is the owner's."""
        call = self.current
        if call is None or call.owner is not owner:
            return None
        self._put(call.outer)
        return call.current


def zeros(layers: Iterable[int], device: torch.device) -> dict[int, Tensor]:
    """{layer: 0-dim, float32}"""
    return {layer: torch.zeros((), dtype=torch.float32, device=device) for layer in layers}
