# SPDX-License-Identifier: Apache-2.0
"""A model as an estimate sees it: blocks in the order of their calls, and what each one costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

PARTS = ("tower", "projector", "llm")


@dataclass
class Counts:
    """What a block does in a step.

    Attributes:
        forward: floating-point operations of matrix products; attention's are those of the full
            square, causal or not.
        backward: those of backward.
        again: of forward, what gradient checkpointing does again: up to the last tensor that
            autograd keeps.
        saved: bytes that autograd keeps from forward to backward, parameters aside.
        moved: bytes that other operators read and write in forward.
        moved_again: in backward.
        calls: operators in forward.
        widest: bytes of the largest result.
    """

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    saved: float = 0.0
    moved: float = 0.0
    moved_again: float = 0.0
    calls: float = 0.0
    widest: float = 0.0


NAMES = tuple(field.name for field in fields(Counts))
Polynomial = tuple[float, ...]


@dataclass(frozen=True)
class Block:
    """An entry of a list of layers, or a module outside of one.

    Attributes:
        name: its path.
        part: "tower", "projector" or "llm".
        parameters: how many numbers.
        counts: {a field of `Counts`: coefficients of 1, n, n squared}, where n is the positions of
            a sample if text passes the block, and the visual tokens of an image if not.
        layer: of the decoder, counted from 1; 0: none.
        has_text: whether text passes it, as all of the LLM's, and a projector that embeds words.
    """

    name: str
    part: str
    parameters: int
    counts: dict[str, Polynomial]
    layer: int
    has_text: bool

    def of(self, number: float) -> Counts:
        """Of one sample with so many positions, or one image of so many tokens."""
        return Counts(
            **{
                name: sum(x * number**power for power, x in enumerate(self.counts.get(name, ())))
                for name in NAMES
            }
        )


@dataclass(frozen=True)
class Structure:
    """A model, and which of its parts train.

    Attributes:
        name: as people call it.
        blocks: in the order of a forward pass.
        layers: of the decoder.
        width: D, of the decoder.
        encoder_width: of what enters the projector for a visual token; None: a token has no such
            row, so that the model has no anchor "pre_projector".
        vocabulary: words.
        visual_tokens: of an image of the usual size.
        grows: whether a larger image has more tokens by itself, rather than in tiles.
        itemsize: bytes of an element of the weights and activations.
        trains: the parts that train.
    """

    name: str
    blocks: tuple[Block, ...]
    layers: int
    width: int
    encoder_width: int | None
    vocabulary: int
    visual_tokens: int
    grows: bool
    itemsize: int
    trains: tuple[str, ...]

    def parameters(self, parts: Sequence[str] = PARTS) -> int:
        """Of some parts."""
        return sum(block.parameters for block in self.blocks if block.part in parts)

    def of_sample(self, text: int, visual: int) -> Iterator[tuple[Block, Counts]]:
        """Each block's counts for a sample of an image of so many tokens, and so much text."""
        for block in self.blocks:
            if block.has_text:
                yield block, block.of(text + visual)
            elif self.grows or not visual:
                yield block, block.of(visual)
            else:  # so many tiles
                counts = block.of(self.visual_tokens)
                tiles = visual / self.visual_tokens
                yield block, Counts(**{name: tiles * getattr(counts, name) for name in NAMES})

    def to_json(self) -> dict[str, Any]:
        """Blocks that cost the same, one after the other, are an entry with their number."""
        found: list[dict[str, Any]] = []
        for block in self.blocks:
            entry = asdict(block) | {"counts": {k: list(v) for k, v in block.counts.items()}}
            entry["times"] = 1
            if found and _same(found[-1], entry):
                found[-1]["times"] += 1
            else:
                found.append(entry)
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "blocks": found}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Structure:
        """What `to_json` wrote."""
        blocks = []
        for entry in content["blocks"]:
            counts = {name: tuple(x) for name, x in entry["counts"].items()}
            for number in range(entry["times"]):
                layer = entry["layer"] + number if entry["layer"] else 0
                name = _numbered(entry["name"], number)
                size, has_text = entry["parameters"], entry["has_text"]
                blocks.append(Block(name, entry["part"], size, counts, layer, has_text))
        more = {"blocks": tuple(blocks), "trains": tuple(content["trains"])}
        return cls(**{**content, **more})


_ALIKE = ("part", "parameters", "counts", "has_text")


def _same(first: dict[str, Any], entry: dict[str, Any]) -> bool:
    times = first["times"]
    return (
        _numbered(first["name"], times) == entry["name"]
        and all(first[name] == entry[name] for name in _ALIKE)
        and entry["layer"] == (first["layer"] + times if first["layer"] else 0)
    )


def _numbered(name: str, more: int) -> str:
    """The path of a later entry of the same list."""
    before, _, last = name.rpartition(".")
    return f"{before}.{int(last) + more}" if more and last.isdecimal() else name
