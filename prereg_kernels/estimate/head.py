# SPDX-License-Identifier: Apache-2.0
"""PRe's own part of a step: its head, its products, its passes over memory, its scratch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from prereg_kernels.estimate.settings import DTYPES, Settings
from prereg_kernels.estimate.structure import Structure
from prereg_kernels.ops.chunking import (
    CPU,
    ChunkBudget,
    choose_chunk_rows,
    gpu_budget,
    scratch_columns,
)


@dataclass(frozen=True)
class Head:
    """On one GPU, with the rows of its samples.

    Attributes:
        layer: whose output it reads.
        rows: N. shapes: (out, in) of each matrix.
        itemsize: bytes of an element of the hidden states.
        weight_itemsize: of the head's weights.
        chunk_rows: of the fused op.
        kept: bytes of the anchor's rows, where it is not what entered the LLM, which is there.
    """

    layer: int
    rows: int
    width: int
    shapes: tuple[tuple[int, int], ...]
    itemsize: int
    weight_itemsize: int
    chunk_rows: int
    kept: float = 0.0

    @property
    def parameters(self) -> int:
        return sum(out * (columns + 1) for out, columns in self.shapes)

    @property
    def flops(self) -> float:
        """Three products a matrix: six for the paper's head."""
        return 6.0 * self.rows * sum(out * columns for out, columns in self.shapes)

    @property
    def scratch(self) -> float:
        """Bytes in backward, beside the gradients."""
        rows = self.chunk_rows * scratch_columns(self.width, self.shapes) * self.itemsize
        elements = sum(out * columns for out, columns in self.shapes)
        casts = elements * self.itemsize * (self.weight_itemsize != self.itemsize)
        sums = 4.0 * elements * (self.chunk_rows < self.rows)
        return rows + casts + sums

    @property
    def moved(self) -> float:
        """Bytes that the fused op reads and writes beside the products: docs/performance.md."""
        hidden, last = self._columns
        passes = 2 * self.width + 2 * hidden + 3 * last + 3 * hidden + 3 * self.width
        elements = sum(out * columns for out, columns in self.shapes)
        chunks = -(-self.rows // self.chunk_rows) if self.rows else 0
        casts = (4 + 2) * elements * (self.weight_itemsize != self.itemsize)
        return float(self.rows * passes * self.itemsize + 8 * elements * max(chunks - 1, 0) + casts)

    @property
    def _columns(self) -> tuple[int, int]:
        """Of what is between the matrices, and of the prediction."""
        outs = [out for out, _ in self.shapes]
        return sum(outs[:-1]), (outs or [self.width])[-1]

    @property
    def eager_saved(self) -> float:
        """Bytes that `eager_pre_loss` keeps: h; u and g; the prediction and the anchor's rows, of
        length 1, in float32."""
        hidden, last = self._columns
        return float(self.rows * (self.itemsize * (self.width + 2 * hidden) + 8 * last))

    @property
    def eager_moved(self) -> float:
        """Bytes that it reads and writes beside the products, each operator for itself."""
        hidden, last = self._columns
        size = self.itemsize
        gathered = 4 * size * self.width + 4 * size * self.width  # two, and a scatter into zeros
        casts = 3 * (size + 4) * last * (size != 4)
        loss = (40 + 100) * last  # of float32, forward and backward, by its operators
        elements = sum(out * columns for out, columns in self.shapes)
        weights = 2 * (4 + size) * elements * (self.weight_itemsize != size)
        return float(self.rows * (gathered + 5 * size * hidden + casts + loss) + weights)


def head_of(structure: Structure, settings: Settings, visual: int, memory: float | None) -> Head:
    """The head of one GPU's step.

    Args:
        visual: tokens of an image.
        memory: bytes of the GPU; None: a CPU.

    Raises:
        ValueError: the decoder has no such layer, or the model no such anchor.
    """
    layer = settings.pre_layer or max(1, structure.layers // 2)
    if layer > structure.layers:
        raise ValueError(
            f"--layer: the decoder has {structure.layers} layers, numbered 1 to "
            f"{structure.layers}; got {layer}"
        )
    width, inner = structure.width, settings.head_features or structure.width
    last = _anchor_width(structure, settings)
    widths = [width, *[inner] * (settings.depth - 1), last][: settings.depth + 1]
    shapes = tuple((out, columns) for columns, out in pairwise(widths))
    rows = max(1, round(settings.samples * visual * settings.token_fraction))
    budget: ChunkBudget = CPU if memory is None else gpu_budget(int(memory))
    chunk = choose_chunk_rows(rows, width, shapes, structure.itemsize, budget)
    head_itemsize = DTYPES[settings.head_dtype]
    kept = 0.0
    if settings.anchor != "pre_llm":
        kept = float(settings.samples * visual * last * structure.itemsize)
    return Head(layer, rows, width, shapes, structure.itemsize, head_itemsize, chunk, kept)


def _anchor_width(structure: Structure, settings: Settings) -> int:
    """A."""
    if settings.anchor == "pre_llm":
        return structure.width
    if structure.encoder_width is None:
        raise ValueError(
            f"--anchor: expected pre_llm, as `apply_pre` takes no other for {structure.name}; got "
            f"{settings.anchor}"
        )
    if not settings.depth and structure.encoder_width != structure.width:
        raise ValueError(
            f"--depth: expected at least 1 with --anchor {settings.anchor}, whose "
            f"{structure.encoder_width} features are not the decoder's {structure.width}; got 0"
        )
    return structure.encoder_width
