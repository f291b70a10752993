"""Sums of products over chunks: in which dtype, by which operation, on which version of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels.ops import products
from prereg_kernels.ops.products import add_product, has_wide_products
from tests.helpers import relative_error

A = torch.randn(40, 5, 30, generator=torch.Generator().manual_seed(0))
B = torch.randn(40, 30, 7, generator=torch.Generator().manual_seed(1))


def total_error(a: Tensor, b: Tensor, wide: torch.dtype | None) -> float:
    """Of the sum over 40 chunks."""
    total: Tensor | None = None
    for x, y in zip(a, b, strict=True):
        total = add_product(total, x, y, wide)
    assert total is not None and total.dtype == (wide or a.dtype)
    return relative_error(total, torch.einsum("kij,kjl->il", a.double(), b.double()))


def test_operands_of_the_sums_dtype() -> None:
    assert total_error(A, B, torch.float32) < 1e-6
    assert total_error(A.double(), B.double(), torch.float64) < 1e-14


def test_low_precision_is_summed_in_float32() -> None:
    assert total_error(A.bfloat16(), B.bfloat16(), torch.float32) < 1e-6
    assert total_error(A.bfloat16(), B.bfloat16(), None) > 1e-3


def test_a_single_product_keeps_its_dtype() -> None:
    product = add_product(None, A[0].bfloat16(), B[0].bfloat16(), None)
    assert torch.equal(product, A[0].bfloat16() @ B[0].bfloat16())


def test_the_sum_is_written_over() -> None:
    total = torch.ones(5, 7)
    assert add_product(total, A[0], B[0], torch.float32) is total


@pytest.mark.parametrize("version", ("2.8.0", "2.10.1+cu128", "2.11.0", "3.0.0"))
def test_wide_products(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: addmm takes a float32 sum from torch 2.11 on; mm makes a float32 product."""
    called = []

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        called.append("mm")
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: Any, out: Tensor) -> Tensor:
        called.append("addmm")
        assert out is total and total.dtype == out_dtype
        return out.copy_(total + a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(products, "has_wide_products", lambda device: True)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    assert total_error(A.bfloat16(), B.bfloat16(), torch.float32) < 1e-6
    adds = version in ("2.11.0", "3.0.0")
    assert called == ["mm", *["addmm" if adds else "mm"] * 39]


def test_where_products_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not has_wide_products(cpu)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_wide_products(gpu)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not has_wide_products(gpu)
