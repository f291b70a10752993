"""Predictive Regularization, the algorithm: a loop over chunks of rows, six matmuls in each.

For the paper's head, per chunk of visual tokens (shapes: h (n, D), g (n, M), z and t (n, A)):

    u = W1 h + b1      g = act(u)      z = W2 g + b2                             2 matmuls
    losses, dz = token losses of (z, t) and their gradient, times the coefficient
    dW2 += dz^T g      db2 += sum dz   dg = dz W2      du = dg * act'(u)         2 matmuls
    dW1 += du^T h      db1 += sum du   dh = du W1                                2 matmuls

Heads of any depth follow the same lines; without a head z is h. Nothing of a chunk outlives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.inputs import Spec
from prereg_kernels.rows import Rows

SCRATCH_BYTES = 256 * 2**20


class Head(NamedTuple):
    """The head's matrices, (out, in) each, and its biases, (out,) or None, one a layer."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]

    def to(self, dtype: torch.dtype) -> Head:
        biases = [None if b is None else b.to(dtype) for b in self.biases]
        return Head([w.to(dtype) for w in self.weights], biases)


class Problem(NamedTuple):
    """The tensors, flat: T positions, of which N are visual tokens."""

    hidden: Tensor  # (T, D)
    anchor: Tensor  # (T or N, A)
    hidden_index: Tensor | None  # (N,) rows of hidden; None: all, in order
    anchor_index: Tensor | None  # (N,) rows of anchor; None: all, in order
    head: Head

    @property
    def tokens(self) -> int:
        """N."""
        return (self.hidden if self.hidden_index is None else self.hidden_index).shape[0]


class Needs(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


class Gradients(NamedTuple):
    hidden: Tensor | None  # (T, D), zero outside the visual tokens
    weights: list[Tensor | None]
    biases: list[Tensor | None]


def losses_only(problem: Problem, spec: Spec, rows: Rows, chunk_rows: int) -> Tensor:
    """(N,) losses. Two matmuls, nothing kept."""
    hidden, anchor, index, anchor_index, head = problem
    head = head.to(spec.compute_dtype)
    losses = hidden.new_empty(problem.tokens, dtype=spec.stat_dtype)
    for chunk in _chunks(problem.tokens, chunk_rows):
        z = rows.gather_rows(hidden, index, chunk, spec.compute_dtype)
        for layer in range(len(head.weights)):
            z = _linear(rows.activate(z, spec.activation) if layer else z, head, layer)
        t = rows.gather_rows(anchor, anchor_index, chunk, anchor.dtype)
        losses[chunk] = rows.token_losses(z, t, spec)
    return losses


def losses_and_gradients(
    problem: Problem,
    spec: Spec,
    rows: Rows,
    chunk_rows: int,
    coefficient: Tensor,
    needs: Needs,
    residual: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """As `losses_only`, with the gradients of `sum(coefficient * losses)`; coefficient (N,).

    The gradient of the hidden states is added to `residual` (T, D), if given, in a new tensor.
    """
    hidden, anchor, index, anchor_index, head = problem
    depth = len(head.weights)
    losses = hidden.new_empty(problem.tokens, dtype=spec.stat_dtype)
    sums = _WeightGradients(head, needs, spec, single=problem.tokens <= chunk_rows)
    unscale = None
    if spec.compute_dtype == torch.float16:  # 1/N would push dz into float16's subnormals
        unscale = power_of_two(coefficient)
        coefficient = coefficient / unscale
    dh = None
    if needs.hidden:
        dh = hidden.new_empty(hidden.shape)
        dh = dh.zero_() if residual is None else dh.copy_(residual)
    head = head.to(spec.compute_dtype)
    lowest = _lowest_layer(needs)

    for chunk in _chunks(problem.tokens, chunk_rows):
        h = rows.gather_rows(hidden, index, chunk, spec.compute_dtype)
        t = rows.gather_rows(anchor, anchor_index, chunk, anchor.dtype)
        inputs, pre_activations, z = [h], [h], h
        for layer in range(depth):
            z = _linear(inputs[layer], head, layer)
            if layer < depth - 1:
                pre_activations.append(z)
                inputs.append(rows.activate(z, spec.activation))

        d = z if depth else torch.empty_like(h)  # h may be a view of the caller's hidden states
        losses[chunk] = rows.token_losses_and_grad(z, t, coefficient[chunk], spec, d)

        for layer in range(depth - 1, lowest - 1, -1):
            sums.add(layer, d, inputs.pop(), rows)
            if layer > lowest or (layer == 0 and dh is not None):
                d = d @ head.weights[layer]
            if layer > lowest:
                d = rows.activation_backward(d, pre_activations.pop(), spec.activation)
        if dh is not None:
            rows.scatter_rows(dh, index, chunk, d if unscale is None else d.float() * unscale)

    return losses, Gradients(dh, *sums.finish(unscale))


def choose_chunk_rows(
    count: int, columns: int, head_shapes: Sequence[tuple[int, int]], itemsize: int
) -> int:
    """How many rows a chunk has: as many as the scratch budget allows, evenly spread.

    Args:
        count: visual tokens N; columns: features D; head_shapes: (out, in) of each matrix;
        itemsize: bytes of an element of the compute dtype.

    The scratch of a row is h, t, and per layer its output, activation and gradient. Each chunk
    also reads and writes the weight gradients, so a chunk keeps at least 512 rows: below that,
    this traffic would no longer be small beside the matmuls.
    """
    widths = columns + sum(3 * shape[0] for shape in head_shapes)
    most = max(512, SCRATCH_BYTES // (widths * itemsize))
    chunks = -(-count // most)
    return max(1, -(-count // max(1, chunks)))


def _chunks(count: int, chunk_rows: int) -> list[slice]:
    return [slice(start, min(start + chunk_rows, count)) for start in range(0, count, chunk_rows)]


def _linear(x: Tensor, head: Head, layer: int) -> Tensor:
    bias, weight = head.biases[layer], head.weights[layer]
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def _lowest_layer(needs: Needs) -> int:
    """The first layer that the backward pass has to reach; the head's depth if none."""
    if needs.hidden:
        return 0
    wanted = [w or b for w, b in zip(needs.weights, needs.biases, strict=True)]
    return wanted.index(True) if any(wanted) else len(wanted)


def power_of_two(coefficient: Tensor) -> Tensor:
    """0-dim: the power of two next above the largest coefficient, exact to scale by."""
    if coefficient.numel() == 0:
        return coefficient.new_ones(())
    largest = coefficient.abs().max()
    _, exponent = torch.frexp(torch.where(largest > 0, largest, torch.ones_like(largest)))
    return torch.ldexp(torch.ones_like(largest), exponent)


class _WeightGradients:
    """dW and db of every layer, summed over the chunks in `stat_dtype`."""

    def __init__(self, head: Head, needs: Needs, spec: Spec, single: bool) -> None:
        self.head, self.needs, self.dtype = head, needs, spec.stat_dtype
        # One product is rounded once, as in eager autograd. In float16 it could overflow.
        self.single = single and spec.compute_dtype != torch.float16
        self.weights: list[Tensor | None] = [None] * len(head.weights)
        self.biases: list[Tensor | None] = [None] * len(head.biases)

    def add(self, layer: int, d: Tensor, x: Tensor, rows: Rows) -> None:
        """dW += d^T x and db += sum d, for d (n, out) and x (n, in)."""
        if self.needs.weights[layer]:
            self.weights[layer] = self._add_product(self.weights[layer], d.T, x)
        if self.needs.biases[layer]:
            if (db := self.biases[layer]) is None:
                db = self.biases[layer] = d.new_zeros(d.shape[1], dtype=self.dtype)
            rows.add_column_sums(db, d)

    def _add_product(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        if self.single or (total is None and a.dtype == self.dtype):
            return a @ b
        if total is None:
            total = a.new_zeros(a.shape[0], b.shape[1], dtype=self.dtype)
        if a.device.type == "cuda" and a.dtype != self.dtype:
            return torch.addmm(total, a, b, out_dtype=self.dtype, out=total)
        # On the CPU no low-precision product has a float32 result, and rounding each would add up
        return total.addmm_(a.to(self.dtype), b.to(self.dtype))

    def finish(self, unscale: Tensor | None) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The sums, in each parameter's own dtype."""

        def cast(total: Tensor | None, parameter: Tensor | None, need: bool) -> Tensor | None:
            if parameter is None or not need:
                return None
            if total is None:  # no visual tokens
                return parameter.new_zeros(parameter.shape)
            return (total if unscale is None else total * unscale).to(parameter.dtype)

        return (
            list(map(cast, self.weights, self.head.weights, self.needs.weights)),
            list(map(cast, self.biases, self.head.biases, self.needs.biases)),
        )
