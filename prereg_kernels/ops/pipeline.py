# SPDX-License-Identifier: Apache-2.0
"""Predictive Regularization, the algorithm: a loop over chunks of rows, six matmuls in each.

For the paper's head, per chunk of visual tokens (shapes: h (n, D), g (n, M), z and t (n, A)):

    u = W1 h + b1      g = act(u)      z = W2 g + b2                             2 matmuls
    losses, dz = token losses of (z, t) and their gradient, times the coefficient
    dW2 += dz^T g      db2 += sum dz   dg = dz W2      du = dg * act'(u)         2 matmuls
    dW1 += du^T h      db1 += sum du   dh = du W1                                2 matmuls

Heads of any depth follow the same lines; without a head z is h. Nothing of a chunk outlives it, and
gradients are written over what they replace: dz over z, du over g, dh over h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.dtypes import to
from prereg_kernels.ops.head_tensors import Head
from prereg_kernels.ops.spec import Spec

Chunk = slice | None  # of the N visual tokens; None: all of them, of which no views are taken


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
    biases: Sequence[bool | None]  # one a layer; None: there is no bias


class Gradients(NamedTuple):
    hidden: Tensor | None  # (T, D), zero outside the visual tokens
    weights: list[Tensor | None]
    biases: list[Tensor | None]


def losses_only(problem: Problem, spec: Spec, backend: Backend) -> Tensor:
    """(N,) losses. Two matmuls, nothing kept."""
    head = problem.head.to(spec.compute_dtype)
    last = len(head.weights) - 1
    losses = problem.hidden.new_empty(problem.tokens, dtype=spec.stat_dtype)
    scratch = _Scratch(problem, spec)
    for chunk in _chunks(problem.tokens, spec.chunk_rows):
        index, t_index = _indices(problem, chunk)
        x, _ = scratch.hidden_rows(backend, chunk, index)
        t = _rows(problem.anchor, t_index, chunk)
        for layer in range(last):
            u = scratch(f"u{layer}", chunk, head.width(layer))
            backend.linear_activate(x, *head.layer(layer), spec.activation, u, u)
            x = u
        if last < 0:
            backend.token_losses(LossChunk(x, None, t, t_index, _part(losses, chunk)), spec)
        else:
            z = scratch("z", chunk, problem.anchor.shape[1])
            out = LossChunk(z, None, t, t_index, _part(losses, chunk))
            backend.linear_losses(x, *head.layer(last), out, spec)
    return losses


def losses_and_gradients(
    problem: Problem,
    spec: Spec,
    backend: Backend,
    coefficient: Tensor,
    needs: Needs,
    residual: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """As `losses_only`, with the gradients of `sum(coefficient * losses)`; coefficient (N,).

    The gradient of the hidden states is added to `residual` (T, D), if given, in a new tensor; both
    have the dtype of the hidden states.
    """
    last = len(problem.head.weights) - 1
    losses = problem.hidden.new_empty(problem.tokens, dtype=spec.stat_dtype)
    single = problem.tokens <= spec.chunk_rows
    sums = _WeightGradients(problem.head, needs, spec, backend, single)
    unscale = None
    # 1/N would push dz, as an operand of the head's matmuls, into float16's subnormals
    if spec.compute_dtype == torch.float16 and last >= 0:
        unscale = power_of_two(coefficient)
        coefficient = coefficient / unscale
    dh, base = None, residual
    if needs.hidden:
        dh = torch.empty_like(problem.hidden, memory_format=torch.contiguous_format)
        if problem.hidden_index is not None:
            base = backend.start_rows(dh, problem.hidden_index, residual)
    head = problem.head.to(spec.compute_dtype)
    lowest = _lowest_layer(needs)
    scratch = _Scratch(problem, spec)

    for chunk in _chunks(problem.tokens, spec.chunk_rows):
        index, t_index = _indices(problem, chunk)
        h, own = scratch.hidden_rows(backend, chunk, index)
        t = _rows(problem.anchor, t_index, chunk)
        inputs, pre_activations = [h], [h]
        for layer in range(last):
            u, g = (scratch(f"{x}{layer}", chunk, head.width(layer)) for x in "ug")
            backend.linear_activate(inputs[-1], *head.layer(layer), spec.activation, u, g)
            pre_activations.append(u)
            inputs.append(g)

        d, db = scratch("z", chunk, problem.anchor.shape[1]), sums.new_bias(last)
        out = LossChunk(
            h if last < 0 else d, None, t, t_index, _part(losses, chunk), _part(coefficient, chunk),
            d, db,
        )  # fmt: skip
        if last < 0:
            backend.token_losses(out, spec)
        else:
            backend.linear_losses(inputs[-1], *head.layer(last), out, spec)

        for layer in range(last, lowest - 1, -1):
            x, u = inputs.pop(), pre_activations.pop()
            sums.add(layer, d, x, db)
            if layer > lowest:  # du is written over g, which nobody needs any more
                weight, bias = head.weights[layer], head.biases[layer - 1]
                db = sums.new_bias(layer - 1)
                backend.linear_backward_activation(d, weight, u, bias, spec.activation, x, db)
                d = x
        if dh is not None:
            into = _rows(dh, index, chunk)
            add = None if base is None else _rows(base, index, chunk)
            if last < 0:
                backend.scatter_rows(d, into, index, unscale, add)
            else:
                direct = not own and unscale is None and dh.dtype == d.dtype
                product = None if direct else h if own else torch.empty_like(h)
                backend.linear_backward_scatter(
                    d, head.weights[0], into, index, unscale, add, product
                )

    return losses, Gradients(dh, *sums.finish(unscale))


class _Scratch:
    """The buffers of a chunk, allocated once: `scratch(name, chunk, columns)` is (n, columns)."""

    def __init__(self, problem: Problem, spec: Spec) -> None:
        self.problem, self.dtype = problem, spec.compute_dtype
        self.rows = min(spec.chunk_rows, problem.tokens)
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, chunk: Chunk, columns: int) -> Tensor:
        buffer = None if chunk is None else self.buffers.get(name)
        if buffer is None:
            buffer = self.problem.hidden.new_empty(self.rows, columns, dtype=self.dtype)
        if chunk is None:  # there is no other
            return buffer
        self.buffers[name] = buffer
        return buffer[: chunk.stop - chunk.start]

    def hidden_rows(
        self, backend: Backend, chunk: Chunk, index: Tensor | None
    ) -> tuple[Tensor, bool]:
        """The chunk's hidden states, and whether they are scratch, or the caller's own."""
        source = _rows(self.problem.hidden, index, chunk)
        if index is None and source.dtype == self.dtype and source.stride(1) == 1:
            return source, False
        h = self("h", chunk, source.shape[1])
        backend.gather_rows(source, index, h)
        return h, True


def _part(x: Tensor, chunk: Chunk) -> Tensor:
    """The chunk's rows of x (N, ...)."""
    return x if chunk is None else x[chunk]


def _rows(x: Tensor, index: Tensor | None, chunk: Chunk) -> Tensor:
    """The chunk's rows of x (T, C): with its index (n,) x itself, from which that takes them."""
    return _part(x, chunk) if index is None else x


def _indices(problem: Problem, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
    """(n,): the chunk's rows of hidden, and of the anchor."""
    index, other = problem.hidden_index, problem.anchor_index
    if chunk is None:
        return index, other
    mine = None if index is None else index[chunk]
    return mine, mine if other is index else None if other is None else other[chunk]


def _chunks(count: int, chunk_rows: int) -> list[Chunk]:
    if 0 < count <= chunk_rows:
        return [None]
    return [slice(start, min(start + chunk_rows, count)) for start in range(0, count, chunk_rows)]


def _lowest_layer(needs: Needs) -> int:
    """The first layer that the backward pass has to reach; the head's depth if none."""
    if needs.hidden:
        return 0
    wanted = [bool(w or b) for w, b in zip(needs.weights, needs.biases, strict=True)]
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

    def __init__(
        self, head: Head, needs: Needs, spec: Spec, backend: Backend, single: bool
    ) -> None:
        self.head, self.needs, self.backend, self.dtype = head, needs, backend, spec.stat_dtype
        # One product is rounded once, as in eager autograd. In float16 it could overflow.
        self.single = single and spec.compute_dtype != torch.float16
        self.weights: list[Tensor | None] = [None] * len(head.weights)
        self.biases: list[Tensor | None] = [None] * len(head.weights)

    def new_bias(self, layer: int) -> Tensor | None:
        """Where the column sums of a chunk's d go; None: nowhere."""
        bias = self.head.biases[layer] if layer >= 0 and self.needs.biases[layer] else None
        return None if bias is None else torch.empty_like(bias, dtype=self.dtype)

    def add(self, layer: int, d: Tensor, x: Tensor, db: Tensor | None) -> None:
        """dW += d^T x and the bias's gradient += db, for d (n, out), x (n, in) and db (out,)."""
        if self.needs.weights[layer]:
            keep = self.single and self.head.weights[layer].dtype != self.dtype
            wide = None if keep else self.dtype
            self.weights[layer] = self.backend.add_product(self.weights[layer], d.t(), x, wide)
        if db is not None:
            total = self.biases[layer]
            self.biases[layer] = db if total is None else total.add_(db)

    def finish(self, unscale: Tensor | None) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The sums, in each parameter's own dtype."""

        def cast(
            total: Tensor | None, parameter: Tensor | None, need: bool | None
        ) -> Tensor | None:
            if parameter is None or not need:
                return None
            if total is None:  # no visual tokens
                return parameter.new_zeros(parameter.shape)
            return to(total if unscale is None else total * unscale, parameter.dtype)

        return (
            list(map(cast, self.weights, self.head.weights, self.needs.weights)),
            list(map(cast, self.biases, self.head.biases, self.needs.biases)),
        )
