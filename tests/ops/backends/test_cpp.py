# SPDX-License-Identifier: Apache-2.0
"""The compiled row primitives, in every variant that this CPU can run."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prereg_kernels._util import private
from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.cpp import CppBackend, unavailable
from prereg_kernels.ops.backends.cpp_libraries import describe, runnable_variants
from prereg_kernels.ops.losses import LOSSES
from prereg_kernels.ops.spec import Spec
from tests.helpers import KERNEL_ACTIVATIONS, relative_error
from tests.ops.backends.primitives import (
    KINDS,
    LAYOUTS,
    SHAPES,
    Kind,
    Placed,
    check_activation,
    check_gather,
    check_losses,
    check_scatter,
    check_start,
)
from tests.ops.backends.test_torch import BOUND, DTYPES, RESIDUALS, act, check_zero_target, draw

if reason := unavailable("cpu"):
    pytest.skip(reason, allow_module_level=True)

VARIANTS = runnable_variants()
SMALL = [shape for shape in SHAPES if math.prod(shape) < 200]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS, ids="-".join)


@pytest.fixture(params=VARIANTS)
def backend(request: pytest.FixtureRequest) -> CppBackend:
    return CppBackend(request.param)


@each_dtype
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@each_shape
def test_gather_rows(
    backend: CppBackend, dtype: torch.dtype, out_dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    for layout in (*LAYOUTS, "transposed"):
        check_gather(backend, shape, dtype, out_dtype, layout, indexed=True)
        check_gather(backend, shape, dtype, out_dtype, layout, indexed=False)


@each_dtype
@pytest.mark.parametrize("into_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", (*RESIDUALS, "transposed"))
def test_scatter_rows(
    backend: CppBackend, dtype: torch.dtype, into_dtype: torch.dtype, residual: str
) -> None:
    for shape, layout, indexed, scale in itertools.product(
        SHAPES, LAYOUTS, (False, True), (None, 0.3)
    ):
        check_scatter(backend, shape, dtype, into_dtype, layout, indexed, scale, residual)


@each_dtype
@pytest.mark.parametrize("residual", (None, *LAYOUTS, "transposed"))
def test_start_rows(backend: CppBackend, dtype: torch.dtype, residual: str | None) -> None:
    for shape in SHAPES:
        check_start(backend, shape, dtype, residual)


@each_dtype
@each_shape
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_activations(
    backend: CppBackend, dtype: torch.dtype, shape: tuple[int, int], activation: str
) -> None:
    for layout in LAYOUTS:
        check_activation(backend, shape, dtype, activation, layout)
    for bias_dtype in {dtype, torch.float32, torch.float64}:
        check_activation(backend, shape, dtype, activation, bias_dtype=bias_dtype)


def values_and_slopes(backend: CppBackend, u: Tensor, activation: str) -> tuple[Tensor, ...]:
    """The activation at u and its derivative, by the rows, then exactly."""
    exact = u.double().requires_grad_()
    expected = act(exact, activation)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    g, du = torch.empty_like(u), torch.ones_like(u)
    backend.activate(u, None, activation, g)
    backend.activation_backward(du, u, None, activation, None)
    # NaN where the formula's derivative is 0 * infinity
    return g.double(), du.double(), expected.detach(), slope.nan_to_num(0)


@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_activations_far_from_zero(backend: CppBackend, activation: str) -> None:
    """No bound on the error of the sum hides a wrong tail, an overflow or an underflow."""
    size = torch.logspace(-20, 18, 200)
    u = torch.cat([torch.linspace(-12, 12, 400), size, -size]).unsqueeze(0)
    g, du, expected, slope = values_and_slopes(backend, u, activation)
    near = {"rtol": 1e-5, "atol": 1e-9}  # the formula in float64 cancels to 1e-15 |u| of the tail
    torch.testing.assert_close(g, expected, **near)
    torch.testing.assert_close(du, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_activations_of_every_16_bit_number(
    backend: CppBackend, dtype: torch.dtype, activation: str
) -> None:
    """Rounded once: half a unit in the last place, and 1/200 of one for the formulas."""
    u = torch.arange(2**16).to(torch.int16).view(dtype)
    u = u[u.abs() < 1000].unsqueeze(0)  # NaN is not
    g, du, expected, slope = values_and_slopes(backend, u, activation)
    rounding = torch.finfo(dtype).eps * (1 / 2 + 1 / 200)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = {"rtol": rounding, "atol": max(2e-7, smallest)}  # gelu's tail ends at -5
    torch.testing.assert_close(g, expected, **bound)
    torch.testing.assert_close(du, slope, rtol=rounding, atol=1e-6)


@each_dtype
@each_kind
@each_shape
def test_token_losses(
    backend: CppBackend, dtype: torch.dtype, kind: Kind, shape: tuple[int, int]
) -> None:
    for layout, in_place in itertools.product(LAYOUTS, (False, True)):
        check_losses(backend, shape, dtype, kind, layout=layout, in_place=in_place)
    for bias_dtype in {dtype, torch.float32, torch.float64}:
        check_losses(backend, shape, dtype, kind, bias_dtype=bias_dtype, indexed=False)


@each_dtype
@each_kind
def test_token_losses_options(backend: CppBackend, dtype: torch.dtype, kind: Kind) -> None:
    for shape in SMALL:
        check_losses(backend, shape, dtype, kind, expanded=True)
        check_losses(backend, shape, dtype, kind, eps=3.0)
        for anchor_dtype, layout, indexed in itertools.product(
            DTYPES, (*LAYOUTS, "transposed"), (False, True)
        ):
            check_losses(
                backend, shape, dtype, kind,
                anchor_dtype=anchor_dtype, anchor_layout=layout, indexed=indexed,
            )  # fmt: skip


@each_kind
def test_nan_and_infinity_reach_the_loss(backend: CppBackend, kind: Kind) -> None:
    """In the body of a row and in its tail; the other rows do not notice."""
    spec = Spec("gelu", *kind, 1e-8, torch.float32)
    clean, t = draw(4, 37), draw(4, 37, seed=1)

    def run(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        losses, dz, ones = torch.empty(4), torch.empty_like(z), torch.ones(4)
        backend.token_losses(LossChunk(z, None, t, None, losses, ones, dz, None), spec)
        return losses, dz

    expected = run(clean, t)
    for value, column, of_anchor in itertools.product(
        (math.nan, math.inf, -math.inf), (0, 36), (False, True)
    ):
        z, anchor = clean.clone(), t.clone()
        (anchor if of_anchor else z)[2, column] = value
        losses, dz = run(z, anchor)
        assert not losses[2].isfinite()
        if math.isnan(value):
            assert losses[2].isnan()
            assert spec.loss == "l1" or dz[2].isnan().any()  # l1's derivative is a sign, 0 of a NaN
        if kind.normalize == "none" and spec.loss != "cosine":  # each element's is its own
            exact = z[2:3].double().requires_grad_()
            [loss] = LOSSES.find(spec.loss).formula(exact, anchor[2:3].double())
            [slope] = torch.autograd.grad(loss, exact)
            torch.testing.assert_close(dz[2:3].double(), slope, equal_nan=True, check_dtype=False)
        for result, clean_result in zip((losses, dz), expected, strict=True):
            others = [0, 1, 3]
            assert torch.equal(result[others], clean_result[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_nan_reaches_the_activation(
    backend: CppBackend, dtype: torch.dtype, activation: str
) -> None:
    u = draw(1, 37, dtype=dtype)
    u[0, 3] = u[0, 36] = math.nan
    g, du = torch.empty_like(u), torch.ones_like(u)
    backend.activate(u, None, activation, g)
    assert torch.equal(g.isnan(), u.isnan())
    if activation != "relu":  # whose derivative at NaN is 1, as in torch
        backend.activation_backward(du, u, None, activation, None)
        assert torch.equal(du.isnan(), u.isnan())


@each_dtype
@pytest.mark.parametrize("shape", ((200, 1100), (3000, 9)), ids=str)
def test_results_do_not_depend_on_the_threads(
    backend: CppBackend, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n, columns = shape
    u, t = draw(n, columns, dtype=dtype), draw(n, columns, dtype=dtype, seed=1)
    spec = Spec("gelu", "cosine", "none", 1e-8, dtype)
    coefficient = draw(n, seed=2).to(spec.stat_dtype)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        du, dz, g, into = t.clone(), torch.empty_like(u), torch.empty_like(u), t.clone()
        sums = torch.zeros(2, columns, dtype=spec.stat_dtype)
        losses = torch.empty(n, dtype=spec.stat_dtype)
        backend.activate(u, None, "gelu", g)
        backend.activation_backward(du, u, None, "gelu", sums[0])
        backend.token_losses(LossChunk(u, None, t, None, losses, coefficient, dz, sums[1]), spec)
        backend.scatter_rows(u, into, None, None, into)
        return [g, du, losses, dz, sums, into]

    try:
        first, *others = [run(threads) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(1)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.skipif(len(VARIANTS) < 2, reason="this CPU runs one variant")
@each_dtype
def test_variants_agree(dtype: torch.dtype) -> None:
    u, t = draw(20, 1100, dtype=dtype), draw(20, 1100, dtype=dtype, seed=1)
    spec = Spec("gelu", "smooth_l1", "layer", 1e-8, dtype)
    ones = torch.ones(20, dtype=spec.stat_dtype)
    results = []
    for variant in VARIANTS:
        backend, g, dz, losses = CppBackend(variant), u.clone(), u.clone(), ones.clone()
        backend.activate(u, None, "gelu", g)
        backend.token_losses(LossChunk(u, None, t, None, losses, ones, dz, None), spec)
        results.append((g, dz, losses))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_error(a, b) < BOUND[dtype]


@pytest.fixture
def tiles(backend: CppBackend, monkeypatch: pytest.MonkeyPatch) -> CppBackend:
    """As on a CPU with tile registers; elsewhere the product is slower, and as exact."""
    if not backend._ops.has_wide_product():
        pytest.skip("this torch comes without MKL's product of bfloat16")
    monkeypatch.setattr(private, "has_amx_tiles", lambda: True)
    return backend


@pytest.mark.parametrize("shape", ((0, 5, 3), (1, 1, 1), (1, 7, 33), (31, 33, 7), (300, 65, 130)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_products(tiles: CppBackend, shape: tuple[int, int, int], layout: str) -> None:
    n, m, k = shape
    d, x = (Placed(draw(n, c, dtype=torch.bfloat16, seed=c), layout).view for c in (m, k))
    exact = d.double().T @ x.double()
    total = tiles.add_product(None, d.T, x, torch.float32)
    assert total.dtype == torch.float32 and total.shape == (m, k)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)
    start = total.clone()
    assert tiles.add_product(total, d.T, x, torch.float32) is total
    torch.testing.assert_close(total.double(), start.double() + exact, rtol=1e-5, atol=1e-5)


def test_wide_products_of_one_row_again_and_again(tiles: CppBackend) -> None:
    """As of a hidden state that is expanded, rows that lie on each other; and a row of a column."""
    d, x = draw(5, 4, dtype=torch.bfloat16), draw(1, 3, dtype=torch.bfloat16, seed=1).expand(5, 3)
    column = draw(3, 1, dtype=torch.bfloat16, seed=2)
    for a, b in ((d, x), (d[:1], column.T)):
        total = tiles.add_product(None, a.T, b, torch.float32)
        torch.testing.assert_close(total.double(), a.double().T @ b.double(), rtol=1e-5, atol=1e-5)


def test_where_products_are_wide(tiles: CppBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert tiles.has_wide_products(cpu, torch.bfloat16)
    assert not tiles.has_wide_products(cpu, torch.float16)
    monkeypatch.setattr(private, "has_amx_tiles", lambda: False)
    assert not tiles.has_wide_products(cpu, torch.bfloat16)


M = torch.zeros(4, 6)
B = M.bfloat16()
WRONG_INDEX = torch.tensor([0, 1, 2, 4])
WRONG_CALLS = {
    "out: expected unit column stride": ("gather_rows", M, None, torch.zeros(6, 4).T),
    r"source: expected 4 rows, as there is no index, got 3": ("gather_rows", M[:3], None, M),
    r"source: expected 6 columns, got shape \[4, 5\]": ("gather_rows", M[:, :5], None, M),
    r"out: its rows overlap": ("gather_rows", M, None, torch.zeros(6).expand(4, 6)),
    r"index: expected values in \[0, 4\), got 4": ("gather_rows", M, WRONG_INDEX, M),
    r"index: expected values in \[0, 4\), got -1": ("gather_rows", M, WRONG_INDEX - 1, M),
    r"index: expected Long, got Int": ("gather_rows", M, WRONG_INDEX.int(), M),
    r"index: expected shape \[4\]": ("gather_rows", M, WRONG_INDEX[:3], M),
    "source: expected float16, bfloat16, float32 or float64": ("gather_rows", M.int(), None, M),
    r"source: expected 2 dimensions, got shape \[6\]": ("gather_rows", M[0], None, M),
    "g: expected Float, got Double": ("activate", M, None, "gelu", M.double()),
    r"g: expected shape \[4, 6\], got \[3, 6\]": ("activate", M, None, "gelu", M[:3]),
    "activation: expected one of gelu, gelu_tanh, silu, relu; got 'tanh'":
        ("activate", M, None, "tanh", M),
    r"bias: expected shape \[6\], got \[5\]": ("activate", M, torch.zeros(5), "gelu", M),
    "sums: expected Float, got Double":
        ("activation_backward", M, M, None, "gelu", torch.zeros(6).double()),
    "sums: expected a contiguous vector of 6":
        ("activation_backward", M, M, None, "gelu", torch.zeros(7)),
    "losses: expected a contiguous vector of 4":
        ("token_losses", M, None, M, None, "mse", "none", 1e-8, torch.zeros(8)[::2]),
    "anchor: expected 6 columns":
        ("token_losses", M, None, M[:, :3], None, "mse", "none", 1e-8, torch.zeros(4)),
    "loss: expected one of cosine, mse, smooth_l1, l1; got 'huber'":
        ("token_losses", M, None, M, None, "huber", "none", 1e-8, torch.zeros(4)),
    "normalize: expected 'none' with loss='cosine', got 'l2'":
        ("token_losses", M, None, M, None, "cosine", "l2", 1e-8, torch.zeros(4)),
    r"coefficient: expected shape \[4\], got \[5\]":
        ("token_losses_and_grad", M, None, M, None, torch.ones(5), "mse", "none", 1e-8,
         torch.zeros(4), M, None),
    r"scale: expected 0 dimensions, got shape \[1\]":
        ("scatter_rows", M, M, None, torch.ones(1), None),
    r"into: expected 4 rows, as there is no index, got 3":
        ("scatter_rows", M, M[:3], None, None, None),
    r"residual: expected shape \[4, 6\], got \[3, 6\]":
        ("scatter_rows", M, M, None, None, M[:3]),
    "residual: expected Float, got Double":
        ("copy_others", M, torch.tensor([0]), M.double()),
    r"index: expected values in \[0, 4\), got 5": ("copy_others", M, torch.tensor([5]), None),
    "d: expected unit column stride": ("wide_product", B.T, B, torch.zeros(6, 6), False),
    "d: expected BFloat16, got Float": ("wide_product", M, B, torch.zeros(6, 6), False),
    r"x: expected shape \[4, 6\], got \[3, 6\]":
        ("wide_product", B, B[:3], torch.zeros(6, 6), False),
    r"total: expected shape \[6, 6\], got \[4, 6\]": ("wide_product", B, B, M, False),
    "total: expected Float, got BFloat16":
        ("wide_product", B, B, torch.zeros(6, 6).bfloat16(), False),
    "total: expected a contiguous matrix":
        ("wide_product", B, B, torch.zeros(6, 8)[:, :6], False),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_arguments_raise(backend: CppBackend, message: str) -> None:
    name, *arguments = WRONG_CALLS[message]
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        getattr(torch.ops, f"prereg_rows_{backend.variant}").__getattr__(name)(*arguments)


def test_only_one_openmp_runtime_is_loaded(backend: CppBackend) -> None:
    # In a process of its own: scikit-learn, in others of these tests, brings another
    code = (
        "import pathlib; from prereg_kernels.ops.backends.cpp import CppBackend; "
        f"CppBackend({backend.variant!r}); print(pathlib.Path('/proc/self/maps').read_text())"
    )
    command = [sys.executable, "-c", code]
    maps = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    runtimes = {Path(path).resolve() for path in maps if "libgomp" in path or "libiomp" in path}
    assert len(runtimes) <= 1


def test_zero_target(backend: CppBackend) -> None:
    check_zero_target(backend)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match=r"variant: expected one of .*; got 'sse'"):
        CppBackend("sse")


def test_describe() -> None:
    described = describe()
    assert described["variant"] == CppBackend().variant == VARIANTS[0]
    assert set(VARIANTS) <= set(described["built"])
