# SPDX-License-Identifier: Apache-2.0
"""Head: the predictor's matrices and biases, a pair a layer, and as custom ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from prereg_kernels.ops.dtypes import to

T = TypeVar("T")


class Head(NamedTuple):
    """The head's matrices, (out, in) each, and its biases, (out,) or None, one a layer."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]

    def layer(self, layer: int) -> tuple[Tensor, Tensor | None]:
        return self.weights[layer], self.biases[layer]

    def width(self, layer: int) -> int:
        """Features of this layer's output."""
        return self.weights[layer].shape[0]

    def to(self, dtype: torch.dtype) -> Head:
        biases = [None if b is None else to(b, dtype) for b in self.biases]
        return Head([to(w, dtype) for w in self.weights], biases)

    def pack(self) -> tuple[list[Tensor], list[int]]:
        """The parameters that there are, weights first, and which layers have a bias.

        A custom op takes these two lists rather than one of biases with gaps: torch differentiates
        an op by its lists `Tensor[]`, and refuses `Tensor?[]`.
        """
        layers = [layer for layer, bias in enumerate(self.biases) if bias is not None]
        return [*self.weights, *(b for b in self.biases if b is not None)], layers

    @classmethod
    def unpack(cls, parameters: Sequence[Tensor], bias_layers: Sequence[int]) -> Head:
        """The head that `pack` was called on."""
        return cls(*by_layer(parameters, bias_layers))


def by_layer(values: Sequence[T], bias_layers: Sequence[int]) -> tuple[Sequence[T], list[T | None]]:
    """What belongs to each packed parameter, as (of the weights, of the biases or None)."""
    depth = len(values) - len(bias_layers)
    of_biases = dict(zip(bias_layers, values[depth:], strict=True))
    return values[:depth], [*map(of_biases.get, range(depth))]
