"""The row primitives: what the algorithm needs beside its matmuls, one backend a file.

Every backend is a module with the functions of `Rows`. The tensors are named as in the paper:
h (n, D) hidden states, u and g (n, M) pre-activation and activation, z and t (n, A) prediction
and target, for a chunk of n rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from prereg_kernels.inputs import Spec, check_name

BACKENDS = ("auto", "torch")


class Rows(Protocol):
    """The interface of a backend. Elementwise work is done in `spec.stat_dtype`."""

    def gather_rows(
        self, source: Tensor, index: Tensor | None, rows: slice, dtype: torch.dtype
    ) -> Tensor:
        """(T, C) -> (n, C) in `dtype`: `source[index[rows]]`; may be a view of the source."""

    def activate(self, u: Tensor, activation: str) -> Tensor:
        """g = act(u), a new tensor (the backward pass needs u)."""

    def activation_backward(self, dg: Tensor, u: Tensor, activation: str) -> Tensor:
        """du = dg * act'(u), written over dg."""

    def token_losses(self, z: Tensor, t: Tensor, spec: Spec) -> Tensor:
        """(n,) losses in `spec.stat_dtype`."""

    def token_losses_and_grad(
        self, z: Tensor, t: Tensor, coefficient: Tensor, spec: Spec, dz: Tensor
    ) -> Tensor:
        """(n,) losses; writes coefficient * dloss/dz into dz, which may be z itself."""

    def scatter_rows(self, into: Tensor, index: Tensor | None, rows: slice, values: Tensor) -> None:
        """`into[index[rows]] += values`, for unique indices: each row has one writer."""

    def add_column_sums(self, into: Tensor, values: Tensor) -> None:
        """`into += values.sum(0)`, summed in the dtype of `into`."""


def choose_rows(backend: str, device: torch.device) -> Rows:
    """The backend's module. "auto" takes the fastest one that runs on `device`.

    Raises:
        ValueError: an unknown backend.
    """
    check_name("backend", backend, BACKENDS)
    from prereg_kernels.rows import torch_rows

    return torch_rows
