# SPDX-License-Identifier: Apache-2.0
"""Every kernel that is shipped, called as the pipeline calls it, on meta tensors of real sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.triton.backend import TritonBackend
from prereg_kernels.ops.names import NORMALIZATIONS
from prereg_kernels.ops.spec import Spec
from tests.helpers import KERNEL_ACTIVATIONS

ROWS, POSITIONS = 6144, 2**20  # of a chunk, and of the whole batch
COLUMNS = (512, 1024, 3584, 4096, 8192, 16384, 20480)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """Launches of one call: `launch(TritonBackend())`."""

    name: str
    launch: Callable[[TritonBackend], None]
    quick: bool = False  # part of every test run, not only of a complete one
    wide: bool = True  # every kernel has to read 16 bytes at once
    tensor_cores: bool = False  # a matmul


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def bias_of(columns: int, dtype: torch.dtype) -> Tensor | None:
    """In 16 bits the matmul before has added it."""
    return None if dtype.itemsize == 2 else meta(columns, dtype=dtype)


def index() -> Tensor:
    return meta(ROWS, dtype=torch.int64)


def all_cases() -> list[Case]:
    return [
        *loss_cases(), *activation_cases(), *gather_cases(), *copy_cases(), *scatter_cases(),
    ]  # fmt: skip


def loss_cases() -> Iterator[Case]:
    for columns in COLUMNS:
        for dtype in DTYPES:
            name = f"{columns} {dtype}"
            quick = dtype == torch.bfloat16 and columns in (512, 3584, 8192, 20480)
            yield Case(f"cosine {name}", _loss(columns, dtype, "cosine"), quick)
            quick = dtype == torch.bfloat16 and columns == 4096
            yield Case(f"losses alone {name}", _losses_alone(columns, dtype, "cosine"), quick)
            yield Case(f"no head {name}", _loss(columns, dtype, "cosine", head=False))
    for columns in (4096, 8192, 20480):
        for dtype in (*DTYPES, torch.float64):
            for loss in ("mse", "smooth_l1", "l1"):
                for normalize in NORMALIZATIONS:
                    worst = (loss, normalize, dtype) == ("smooth_l1", "layer", torch.float32)
                    name = f"{loss} {normalize} {columns} {dtype}"
                    yield Case(name, _loss(columns, dtype, loss, normalize), worst)
    yield Case("cosine 4096 float64", _loss(4096, torch.float64, "cosine"))
    name = "cosine of a transposed anchor"
    yield Case(name, _loss(4096, torch.bfloat16, "cosine", transposed=True), wide=False)


def _loss(
    columns: int,
    dtype: torch.dtype,
    loss: str,
    normalize: str = "none",
    head: bool = True,
    transposed: bool = False,
) -> Callable[[TritonBackend], None]:
    def launch(backend: TritonBackend) -> None:
        spec = Spec("gelu", loss, normalize, 1e-8, dtype)
        z = meta(ROWS, columns, dtype=dtype)
        anchor = meta(POSITIONS, columns, dtype=dtype)
        if transposed:
            anchor = meta(columns, POSITIONS, dtype=dtype).T
        chunk = LossChunk(
            z,
            bias_of(columns, dtype) if head else None,
            anchor,
            index(),
            meta(ROWS, dtype=spec.stat_dtype),
            meta(1, dtype=spec.stat_dtype).expand(ROWS),
            z if head else meta(ROWS, columns, dtype=dtype),
            meta(columns, dtype=spec.stat_dtype) if head else None,
        )
        backend.token_losses(chunk, spec)

    return launch


def _losses_alone(columns: int, dtype: torch.dtype, loss: str) -> Callable[[TritonBackend], None]:
    def launch(backend: TritonBackend) -> None:
        spec = Spec("gelu", loss, "none", 1e-8, dtype)
        z, bias = meta(ROWS, columns, dtype=dtype), bias_of(columns, dtype)
        anchor = meta(POSITIONS, columns, dtype=dtype)
        backend.token_losses(
            LossChunk(z, bias, anchor, index(), meta(ROWS, dtype=spec.stat_dtype)), spec
        )

    return launch


def activation_cases() -> Iterator[Case]:
    for activation in KERNEL_ACTIVATIONS:
        for dtype in (*DTYPES, torch.float64):
            for columns in (512, 3584, 4096):
                name = f"{activation} {columns} {dtype}"
                quick = name in ("gelu_tanh 3584 torch.bfloat16", "gelu 4096 torch.bfloat16")
                yield Case(f"forward {name}", _activate(columns, dtype, activation), quick)
                quick = name in ("gelu 3584 torch.bfloat16", "silu 4096 torch.float64")
                yield Case(f"backward {name}", _backward(columns, dtype, activation), quick)


def _activate(columns: int, dtype: torch.dtype, activation: str) -> Callable[[TritonBackend], None]:
    def launch(backend: TritonBackend) -> None:
        u, bias = meta(ROWS, columns, dtype=dtype), bias_of(columns, dtype)
        backend.activate(u, bias, activation, torch.empty_like(u))

    return launch


def _backward(columns: int, dtype: torch.dtype, activation: str) -> Callable[[TritonBackend], None]:
    def launch(backend: TritonBackend) -> None:
        u, bias = meta(ROWS, columns, dtype=dtype), bias_of(columns, dtype)
        sums = meta(columns, dtype=torch.promote_types(dtype, torch.float32))
        backend.activation_backward(torch.empty_like(u), u, bias, activation, sums)

    return launch


def gather_cases() -> Iterator[Case]:
    for source in DTYPES:
        for out in DTYPES:
            quick = out == torch.bfloat16 and source == torch.float32
            yield Case(f"gather {source} to {out}", _gather(source, out), quick)
    for dtype in DTYPES:
        name = f"gather transposed {dtype}"
        yield Case(name, _gather(dtype, dtype, True), dtype == torch.bfloat16, wide=False)


def _gather(
    source: torch.dtype, out: torch.dtype, transposed: bool = False
) -> Callable[[TritonBackend], None]:
    def launch(backend: TritonBackend) -> None:
        h, into = meta(POSITIONS, 4096, dtype=source), meta(ROWS, 4096, dtype=out)
        if transposed:
            backend.gather_rows(meta(4096, ROWS, dtype=source).T, None, into)
        else:
            backend.gather_rows(h, index(), into)

    return launch


def copy_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for residual in (False, True):
            name = f"other rows{' of a residual' if residual else ''} {dtype}"
            yield Case(name, _start(dtype, residual), dtype == torch.bfloat16, wide=residual)


def _start(dtype: torch.dtype, residual: bool) -> Callable[[TritonBackend], None]:
    def launch(backend: TritonBackend) -> None:
        into = meta(POSITIONS, 4096, dtype=dtype)
        backend.start_rows(into, index(), torch.empty_like(into) if residual else None)

    return launch


def scatter_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for accumulate in (False, True):
            name = f"scatter{' adding' if accumulate else ''} {dtype}"
            quick = accumulate and dtype == torch.bfloat16
            yield Case(name, _scatter(dtype, dtype, accumulate), quick)
            name = f"scatter scaled{' adding' if accumulate else ''} {dtype} to float32"
            yield Case(name, _scatter(dtype, torch.float32, accumulate, scaled=True))


def _scatter(
    dtype: torch.dtype, into: torch.dtype, accumulate: bool, scaled: bool = False
) -> Callable[[TritonBackend], None]:
    def launch(backend: TritonBackend) -> None:
        values, dh = meta(ROWS, 4096, dtype=dtype), meta(POSITIONS, 4096, dtype=into)
        residual = torch.empty_like(dh) if accumulate else None
        backend.scatter_rows(values, dh, index(), meta() if scaled else None, residual)

    return launch
