# SPDX-License-Identifier: Apache-2.0
"""A GPU's memory over a step: forward block by block, then backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from prereg_kernels.estimate.head import Head
from prereg_kernels.estimate.settings import DTYPES, OPTIMIZERS, Settings
from prereg_kernels.estimate.structure import Counts, Structure

Kind = Literal["weights", "optimizer", "gradients", "activations", "scratch", "pre"]
How = Literal["none", "fused", "eager"]


@dataclass(frozen=True)
class Moment:
    """A place of a step, and the bytes that are held there.

    Attributes:
        place: the block.
        phase: "forward", "loss", "backward" or "update".
        layer: of the decoder, counted from 1; 0: none.
        bytes: by kind. "pre": of PRe, its weights and their gradients and state among them.
    """

    place: str
    phase: str
    layer: int
    bytes: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


@dataclass
class _Ledger:
    held: dict[str, float] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)

    def add(self, kind: Kind, count: float) -> None:
        self.held[kind] = self.held.get(kind, 0.0) + count

    def note(self, place: str, phase: str, layer: int = 0, scratch: float = 0.0) -> None:
        held = self.held | {"scratch": self.held.get("scratch", 0.0) + scratch}
        self.moments.append(Moment(place, phase, layer, held))


@dataclass(frozen=True)
class Shares:
    """How the bytes of a model lie on one of several GPUs.

    Attributes:
        weights, gradients, optimizer: shares of each.
        itemsize: bytes of a weight, and of its gradient. master: of what the optimizer has
            besides, in float32, for each of its numbers and for a copy of the weight.
        buckets: whether gradients are there twice: in DDP's buckets all the time, and from their
            backward on as `.grad` too, as torch has it without `gradient_as_bucket_view`.
        gathered: whether whole layers are brought together to be used.
        copies: bytes of a low-precision copy of each weight.
    """

    weights: float
    gradients: float
    optimizer: float
    itemsize: int
    state: float
    buckets: bool
    gathered: bool
    copies: float

    @classmethod
    def of(cls, settings: Settings, itemsize: int) -> Shares:
        """By engine: FSDP and ZeRO-3 share all, ZeRO-2 gradients and state, DDP nothing."""
        replica, kind = 1 / settings.replicas, settings.parallel
        split = 1 / settings.split
        own = DTYPES[settings.weights]
        numbers = OPTIMIZERS[settings.optimizer]
        is_zero = kind in ("zero2", "zero3")
        # DeepSpeed keeps float32 weights and state beside weights of low precision
        state = 4.0 * (numbers + 1) if is_zero and own == 2 else float(own * numbers)
        shared = kind in ("fsdp", "zero3")
        return cls(
            weights=(replica if shared else 1.0) * split,
            gradients=(replica if shared or kind == "zero2" else 1.0) * split,
            optimizer=(replica if shared or is_zero else 1.0) * split,
            itemsize=own,
            state=state,
            buckets=kind in ("ddp", "tp") and settings.replicas > 1,
            gathered=shared and settings.gpus > 1,
            copies=float(itemsize) if own > itemsize and not shared else 0.0,
        )

    def gradient(self, parameters: int, trains: bool) -> float:
        """Bytes of one's own share of their gradients."""
        return trains * parameters * self.itemsize * self.gradients


def timeline(
    structure: Structure, settings: Settings, visual: int, head: Head | None, how: How
) -> list[Moment]:
    """Every place of a step in its order.

    Args:
        visual: tokens of an image. head: None: a step without PRe.
    """
    ledger, shares = _Ledger(), Shares.of(settings, structure.itemsize)
    samples = settings.samples
    blocks = list(structure.of_sample(settings.tokens, visual))
    positions = samples * (settings.tokens + visual)
    row = positions * structure.width * structure.itemsize
    total = structure.parameters()
    trained = structure.parameters(structure.trains)
    ledger.add("weights", total * shares.weights * (shares.itemsize + shares.copies))
    ledger.add("optimizer", trained * shares.state * shares.optimizer)
    if shares.buckets:
        ledger.add("gradients", shares.gradient(trained, True))
    own = 0.0 if head is None else float(head.parameters * head.weight_itemsize) * settings.split
    if head is not None:  # layers that are split have it whole
        state = OPTIMIZERS[settings.optimizer] * shares.optimizer
        ledger.add("pre", own * (shares.weights + state + shares.buckets * shares.gradients))
    gradient_of_head = own * shares.gradients
    gathered = _gathered(structure, shares)
    for block, counts in blocks[:-1]:  # the last is the loss
        redone = settings.checkpointing and block.layer > 0
        scratch = samples * 2 * counts.widest / settings.split + gathered
        ledger.note(block.name, "forward", block.layer, scratch)
        ledger.add("activations", row if redone else _saved(structure, settings, counts, positions))
    # The layer's output, of which a norm keeps a float32 copy alone
    kept = row if head and not settings.checkpointing and structure.itemsize == 2 else 0.0
    kept += head.kept if head else 0.0
    ledger.add("pre", kept)
    words = float(positions) * structure.vocabulary / settings.split
    eager = head.eager_saved if head is not None and how == "eager" else 0.0
    ledger.add("activations", 4 * words)
    ledger.add("pre", eager)
    ledger.note("loss", "loss", 0, 8 * words + gathered)
    ledger.note("loss", "backward", 0, 8 * words + gathered)
    ledger.add("activations", -4 * words)
    if how == "eager":  # autograd takes it back first, as it ran last
        ledger.add("pre", gradient_of_head - eager + row)
    for block, counts in reversed(blocks[:-1]):
        redone = settings.checkpointing and block.layer > 0
        saved = _saved(structure, settings, counts, positions)
        trains = block.part in structure.trains
        gradient = shares.gradient(block.parameters, trains)
        whole = trains * block.parameters * shares.itemsize / settings.split
        if head is not None and block.layer == head.layer:
            _tap(ledger, head, how, row, gradient_of_head)
            ledger.add("pre", -kept)
        if not counts.backward and not counts.saved:
            continue
        busy = samples * 2 * counts.widest / settings.split + row
        ledger.add("activations", saved if redone else 0.0)
        ledger.note(
            block.name, "backward", block.layer,
            busy + gathered + (whole if gradient < whole else 0.0) + gradient,
        )  # fmt: skip
        ledger.add("activations", -saved - (row if redone else 0.0))
        ledger.add("gradients", gradient)
    ledger.note("update", "update")
    return ledger.moments


def _tap(ledger: _Ledger, head: Head, how: How, row: float, gradient: float) -> None:
    """PRe in backward, where the layers behind its own are done."""
    if how == "eager":
        ledger.add("pre", -row)
        return
    ledger.add("pre", gradient)
    ledger.held["pre"] += head.scratch + row
    ledger.note("PRe", "backward", head.layer, row)
    ledger.held["pre"] -= head.scratch + row


def _saved(structure: Structure, settings: Settings, counts: Counts, positions: int) -> float:
    """Bytes on one GPU. Where a layer is split, its norms and residuals are not."""
    saved = settings.samples * counts.saved
    whole = min(saved, 8.0 * positions * structure.width * structure.itemsize)
    return whole + (saved - whole) / settings.split


def _gathered(structure: Structure, shares: Shares) -> float:
    """Two layers whole: the one that runs and the next."""
    if not shares.gathered:
        return 0.0
    largest = max(block.parameters for block in structure.blocks)
    return 2.0 * largest * structure.itemsize


def peak(moments: Sequence[Moment]) -> Moment:
    """The moment with the most bytes, the first of several."""
    return max(moments, key=lambda moment: moment.total)
