# SPDX-License-Identifier: Apache-2.0
"""Sums of products over chunks: in which dtype, by which operation, on which version of torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels.ops import products
from prereg_kernels.ops.products import WideProducts, add_product
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


CAN = {
    "torch 2.8": WideProducts(True, False),
    "torch 2.11": WideProducts(True, True),
    "ROCm": WideProducts(False, False),
}


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU that has the products of such a GPU; what was called."""
    can, called = CAN[request.param], list[str]()

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        if not can.product:
            raise RuntimeError("out_dtype is not supported on this device")
        called.append("mm")
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: Any, out: Tensor) -> Tensor:
        if not can.sum:
            raise RuntimeError("self must have the same dtype as mat1")
        called.append("addmm")
        assert out is total and total.dtype == out_dtype
        return out.copy_(total + a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(products, "_found", {})
    return called


@pytest.mark.parametrize("calls", CAN, indirect=True)
def test_it_is_tried_out_whatever_the_version_says(
    calls: list[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    can = CAN[request.node.callspec.params["calls"]]
    monkeypatch.setattr(torch, "__version__", "1.0")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert products._try_out(torch.device("cpu"), torch.bfloat16) == can


@pytest.mark.parametrize("calls", CAN, indirect=True)
def test_wide_products(
    calls: list[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device's sums are as exact, by what it has."""
    can = CAN[request.node.callspec.params["calls"]]
    monkeypatch.setattr(products, "wide_products", lambda device, dtype: can)
    assert total_error(A.bfloat16(), B.bfloat16(), torch.float32) < 1e-6
    later = "addmm" if can.sum else "mm"
    assert calls == (["mm", *[later] * 39] if can.product else [])


def test_they_are_tried_out_once_and_not_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, capturing = [], True
    everything = CAN["torch 2.11"]
    monkeypatch.setattr(products, "_found", {})
    monkeypatch.setattr(products, "_try_out", lambda *key: tried.append(key) or everything)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    gpus = [torch.device("cuda", i) for i in range(2)]
    assert products.wide_products(gpus[0], torch.bfloat16) == CAN["ROCm"]
    capturing = False
    for gpu in gpus * 2:
        assert products.wide_products(gpu, torch.bfloat16) == everything
    capturing = True
    assert products.wide_products(gpus[0], torch.bfloat16) == everything
    assert tried == [(gpu, torch.bfloat16) for gpu in gpus]
    for device, dtype in ((torch.device("cpu"), torch.bfloat16), (gpus[0], torch.float32)):
        assert products.wide_products(device, dtype) == CAN["ROCm"]
    assert len(tried) == 2


@pytest.mark.parametrize("calls", ["torch 2.11"], indirect=True)
def test_float16_that_accumulates_in_float16(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where such products then raise: the setting is asked in each call."""
    mm = torch.mm

    def strict(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        if a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
            raise RuntimeError("out_dtype needs full precision")
        return mm(a, b, out_dtype)

    def on_gpu(device: torch.device, dtype: torch.dtype) -> WideProducts:
        return tried_on(torch.device("cuda"), dtype)

    try_out, tried_on = products._try_out, products.wide_products
    monkeypatch.setattr(torch, "mm", strict)
    monkeypatch.setattr(products, "_try_out", lambda _, dtype: try_out(torch.device("cpu"), dtype))
    monkeypatch.setattr(products, "wide_products", on_gpu)
    for accumulates in (False, True, False):
        matmul = SimpleNamespace(allow_fp16_accumulation=accumulates)
        monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
        calls.clear()
        assert total_error(A.half(), B.half(), torch.float32) < 1e-6
        assert bool(calls) == (not accumulates)
        assert total_error(A.bfloat16(), B.bfloat16(), torch.float32) < 1e-6
        assert calls
