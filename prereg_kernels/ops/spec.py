# SPDX-License-Identifier: Apache-2.0
"""Spec: what to compute, apart from the tensors; the names and numbers among the arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.ops.activations import ACTIVATIONS, Activation
from prereg_kernels.ops.dtypes import stat_dtype
from prereg_kernels.ops.losses import LOSSES, Loss
from prereg_kernels.ops.names import NORMALIZATIONS, REDUCTIONS


class Spec(NamedTuple):
    """What to compute: plain values, so that a custom op can take them."""

    activation: str  # a text that `ACTIVATIONS` finds
    loss: str  # and one that `LOSSES` finds
    normalize: str
    eps: float
    compute_dtype: torch.dtype  # of the matmul operands
    chunk_rows: int = 0  # 0: the pipeline chooses
    backend: str = "auto"

    @property
    def stat_dtype(self) -> torch.dtype:
        """Of row statistics, losses and everything elementwise."""
        return stat_dtype(self.compute_dtype)

    def pack(self) -> str:
        """All of it in a text, which a custom op takes: "gelu cosine none 1e-08 float32 0 auto".

        A float's text has all of its digits. Its !r would be a graph break in torch.compile from
        Python 3.13 on, where eps may be symbolic.
        """
        dtype = str(self.compute_dtype).removeprefix("torch.")
        names = f"{self.activation} {self.loss} {self.normalize}"
        return f"{names} {self.eps} {dtype} {self.chunk_rows} {self.backend}"

    @classmethod
    def unpack(cls, text: str) -> Spec:
        """What `pack` was called on."""
        spec = _UNPACKED.get(text)
        if spec is None:
            activation, loss, normalize, eps, dtype, chunk_rows, backend = text.split(" ")
            compute_dtype = getattr(torch, dtype)
            spec = cls(
                activation, loss, normalize, float(eps), compute_dtype, int(chunk_rows), backend
            )
            if len(_UNPACKED) < 1000:  # a program uses few, but chunk_rows may follow the batch
                _UNPACKED[text] = spec
        return spec


_UNPACKED: dict[str, Spec] = {}


def check_spec(
    activation: str | Activation,
    loss: str | Loss,
    normalize: str,
    eps: float,
    compute_dtype: torch.dtype,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Spec:
    """Check the names and numbers among the arguments.

    Raises:
        ValueError: an unknown name, an eps that is not positive, a normalisation that the loss does
            not take.
        TypeError: eps is not a number, chunk_rows is not an integer.
    """
    activation = ACTIVATIONS.text_of(activation)
    loss = LOSSES.text_of(loss)
    check_name("normalize", normalize, NORMALIZATIONS)
    definition = LOSSES.find(loss)
    if normalize != "none" and normalize not in definition.normalizations:
        own = "" if definition.own_normalization == "none" else ", which normalises by itself,"
        raise ValueError(
            f"normalize: loss={loss!r}{own} takes {', '.join(definition.normalizations)}; "
            f"got {normalize!r}"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a positive number, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a positive finite number, got {eps}")
    least = torch.finfo(stat_dtype(compute_dtype)).tiny
    if eps < least:  # a row of zeros is divided by it
        raise ValueError(f"eps: expected at least {least:.1e}, the least normal number, got {eps}")
    if chunk_rows is not None:
        if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
            raise TypeError(
                f"chunk_rows: expected None or a positive integer, got {type(chunk_rows).__name__}"
            )
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows: expected None or a positive integer, got {chunk_rows}")
    # float and int make of what torch.compile has not looked at yet a number that has a text
    rows = int(chunk_rows or 0)
    return Spec(activation, loss, normalize, float(eps), compute_dtype, rows, backend)


def check_reduction(reduction: str, denominator: float | Tensor | None) -> None:
    """Check the reduction, and that a denominator goes with "mean".

    Raises:
        ValueError: otherwise.
    """
    check_name("reduction", reduction, REDUCTIONS)
    if denominator is not None and reduction != "mean":
        raise ValueError(f"denominator: goes with reduction='mean', got reduction={reduction!r}")


def check_name(argument: str, value: object, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the `known` names."""
    if value not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(known)}; got {value!r}")
