# SPDX-License-Identifier: Apache-2.0
"""Each Triton kernel against a formula in float64: interpreted on a CPU, or on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/ops/backends/test_triton.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.torch import TorchBackend
from prereg_kernels.ops.backends.triton import config
from prereg_kernels.ops.backends.triton.backend import TritonBackend, interpreting, unavailable
from prereg_kernels.ops.spec import Spec
from tests.helpers import KERNEL_ACTIVATIONS, relative_error
from tests.ops.backends.test_torch import (
    BOUND,
    DTYPES,
    RESIDUALS,
    act,
    check_zero_target,
    losses_of,
)

DEVICE = torch.device("cpu" if interpreting() or not torch.cuda.is_available() else "cuda")
if interpreting():  # asked for: that it cannot be is a failure
    assert unavailable("cpu") is None, unavailable("cpu")
    from tests.ops.backends.interpreter import repair

    repair()
elif reason := unavailable(DEVICE.type):
    pytest.skip(reason, allow_module_level=True)

# Hidden states in float64 are never computed with in 16 bits
CONVERSIONS = [
    (source, out)
    for source in DTYPES
    for out in DTYPES
    if not (torch.float64 in (source, out) and 2 in (source.itemsize, out.itemsize))
]
SHAPES = ((1, 1), (5, 7), (130, 33), (5, 257))
# Interpreting one row of the loss takes some 20 ms
LOSS_SHAPES = ((1, 1), (5, 7), (6, 33), (3, 257))
KINDS = [("cosine", "none")] + [
    (loss, normalize)
    for loss in ("mse", "smooth_l1", "l1")
    for normalize in ("none", "l2", "layer")
]
BACKEND = TritonBackend()
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Every torch.empty is full of NaN: what is read must have been written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def some_rows(count: int, of: int) -> Tensor:
    """(count,) of `of` rows, in no order, as a view that is not contiguous."""
    index = torch.randperm(of, generator=torch.Generator().manual_seed(1))[:count]
    return index.to(DEVICE).repeat_interleave(2)[::2]


def padded(x: Tensor) -> Tensor:
    """x, its rows apart."""
    wide = empty(x.shape[0], x.shape[1] + 3, dtype=x.dtype)
    view = wide[:, : x.shape[1]]
    return view.copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "padded": padded,
    "transposed": lambda x: x.T.contiguous().T,
    "every other": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "reversed twice": lambda x: x.flip(0).contiguous().flip(0),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_layout
@each_shape
@pytest.mark.parametrize("indexed", (False, True))
def test_gather_rows(shape: tuple[int, int], layout: str, indexed: bool) -> None:
    rows, columns = shape
    for source_dtype, dtype in CONVERSIONS:
        if source_dtype == dtype or layout == "padded":
            source = LAYOUTS[layout](draw(2 * rows, columns, dtype=source_dtype))
            index = some_rows(rows, 2 * rows) if indexed else None
            out = padded(empty(rows, columns, dtype=dtype))
            source = source if indexed else source[rows:]
            BACKEND.gather_rows(source, index, out)
            expected = source[index] if indexed else source
            assert torch.equal(out, expected.to(dtype))
            assert rows == 1 or out.storage_offset() + out.numel() < out.untyped_storage().nbytes()


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("scaled", (False, True))
@each_shape
def test_scatter_rows(shape: tuple[int, int], scaled: bool, residual: str) -> None:
    rows, columns = shape
    for dtype, into_dtype in CONVERSIONS:
        for layout in ("contiguous", "padded", "transposed"):
            if dtype == into_dtype or layout == "contiguous":
                _check_scatter(rows, columns, dtype, into_dtype, layout, scaled, residual)


def _check_scatter(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    into_dtype: torch.dtype,
    layout: str,
    scaled: bool,
    residual: str,
) -> None:
    values = padded(draw(rows, columns, dtype=dtype))
    scale = torch.tensor(0.37, device=DEVICE) if scaled else None
    for index in (None, some_rows(rows, 2 * rows)):
        before = draw(2 * rows, columns, dtype=into_dtype, seed=1)
        into = LAYOUTS[layout](before.clone())
        another = padded(draw(2 * rows, columns, dtype=into_dtype, seed=2))
        whole = {"none": None, "another": another, "into": into}[residual]
        target = into[:rows] if index is None else into
        add = whole[:rows] if whole is not None and index is None else whole
        exact = before.double()
        chosen = slice(0, rows) if index is None else index
        added = values.double() * (1.0 if scale is None else scale.double())
        exact[chosen] = added if whole is None else added + whole[chosen].double()
        BACKEND.scatter_rows(values, target, index, scale, add)
        changed = torch.zeros(2 * rows, dtype=torch.bool, device=DEVICE)
        changed[chosen] = True
        assert torch.equal(into[~changed], before[~changed])
        wide = torch.float64 if torch.float64 in (dtype, into_dtype) else torch.float32
        rounding = 0.0 if not scaled and whole is None else torch.finfo(wide).eps
        allowed = exact.abs() * (torch.finfo(into_dtype).eps / 2) + 4 * rounding
        if into_dtype == torch.float16:
            allowed += 2**-25  # half of the smallest subnormal
        assert ((into.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("layout", (None, *LAYOUTS))
@pytest.mark.parametrize("small", (False, True))
def test_start_rows(small: bool, layout: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the index are copied, too, where that is little."""
    from prereg_kernels.ops.backends.triton import backend

    monkeypatch.setattr(backend, "SMALL_COPY", 2**30 if small else 0)
    for dtype in DTYPES:
        for rows, columns in ((9, 7), (70, 33), (6, 1040)):
            values, into = draw(rows, columns, dtype=dtype), empty(rows, columns, dtype=dtype)
            residual = None if layout is None else LAYOUTS[layout](values)
            index = some_rows(rows - 5, rows)
            left = BACKEND.start_rows(into, index, residual)
            others = torch.ones(rows, dtype=torch.bool, device=DEVICE).index_fill(0, index, False)
            expected = torch.zeros_like(values) if residual is None else values
            assert torch.equal(into[others], expected[others])
            assert into[~others].isnan().all() or small
            assert left is None if residual is None else torch.equal(left[index], values[index])


@each_dtype
@each_shape
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_activations(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    for has_bias in (False, True):
        u, dg = padded(draw(*shape, dtype=dtype)), padded(draw(*shape, dtype=dtype, seed=1))
        bias = draw(shape[1], dtype=dtype, seed=2) if has_bias else None
        exact = u.double().clone()
        if bias is not None:
            exact += bias.double()
        exact.requires_grad_()
        g = act(exact, activation)
        (du,) = torch.autograd.grad(g, exact, dg.double())

        kept = u.clone()
        out = empty(*shape, dtype=dtype)
        BACKEND.activate(u, bias, activation, out)
        assert relative_error(out, g.detach()) < BOUND[dtype]
        assert torch.equal(u, kept)
        BACKEND.activate(kept, bias, activation, kept)
        assert torch.equal(kept, out), "in place"

        stat = torch.promote_types(dtype, torch.float32)
        sums, expected = draw(shape[1], dtype=stat, seed=3), du.sum(0)
        without = dg.clone()
        BACKEND.activation_backward(without, u, bias, activation, None)
        BACKEND.activation_backward(dg, u, bias, activation, sums)
        assert torch.equal(without, dg)
        assert relative_error(dg, du) < BOUND[dtype]
        assert relative_error(sums, expected) < BOUND[stat]


def test_gelu_is_rounded_as_the_truth() -> None:
    """Over all of bfloat16. By 1 + erf, which cancels, 4 of 1000 results were next to it."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    u = numbers[numbers.abs() <= 10].reshape(-1, 2).to(DEVICE)
    exact = u.double().requires_grad_()
    g = exact * torch.special.erfc(-exact / 2**0.5) / 2
    (slope,) = torch.autograd.grad(g.sum(), exact)
    out, du = torch.empty_like(u), torch.ones_like(u)
    BACKEND.activate(u, None, "gelu", out)
    BACKEND.activation_backward(du, u, None, "gelu", None)
    for ours, truth in ((out, g.detach()), (du, slope)):
        is_normal = truth.abs() > torch.finfo(torch.float32).tiny
        wrong = (ours != truth.bfloat16()) & is_normal
        assert wrong.double().mean() < 1e-4


def forget_plans() -> None:
    """What `config` decided with other constants."""
    config.tile.cache_clear()
    config.loss_row.cache_clear()


@pytest.fixture(autouse=True)
def own_plans() -> Iterator[None]:
    """For tests that change the constants, and for those after them."""
    forget_plans()
    yield
    forget_plans()


@contextmanager
def registers(count: int) -> Iterator[None]:
    """With few, rows are read in blocks of columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "REGISTERS", count)
        patch.setattr(config, "COLUMN_BLOCK", 128)
        forget_plans()
        yield
    forget_plans()


@each_dtype
@pytest.mark.parametrize(("loss", "normalize"), KINDS)
@pytest.mark.parametrize("in_blocks", (False, True))
def test_token_losses(dtype: torch.dtype, loss: str, normalize: str, in_blocks: bool) -> None:
    first = DTYPES.index(dtype) + KINDS.index((loss, normalize))
    for case in (first % 4, (first + 2) % 4):
        shape = LOSS_SHAPES[case]
        if shape[1] == 1 and normalize == "layer":
            continue  # the variance of one number: 0 / sqrt(eps)
        spec = Spec("gelu", loss, normalize, 3.0 if case == 1 else 1e-8, dtype)
        with registers(16 if in_blocks else 65536):
            _check_losses(shape, spec, case, in_place=first // 4 % 2 == 0, has_bias=case > 0)


def _check_losses(
    shape: tuple[int, int], spec: Spec, case: int, in_place: bool, has_bias: bool
) -> None:
    rows, columns = shape
    dtype, stat = spec.compute_dtype, spec.stat_dtype
    scale = 0.1 + 2 * torch.rand(rows, 1, generator=torch.Generator().manual_seed(4))
    z = padded((2 * draw(*shape) * scale.to(DEVICE)).to(dtype))  # around eps = 3
    bias = draw(columns, dtype=dtype, seed=5) if has_bias else None
    layout = list(LAYOUTS.values())[case]
    anchor_dtype = DTYPES[(DTYPES.index(dtype) + case) % 4]
    anchor = layout(2 * draw(2 * rows, columns, dtype=anchor_dtype, seed=1))
    index = some_rows(rows, 2 * rows) if case % 2 else None
    anchor = anchor[:rows] if index is None else anchor
    coefficient = columns * draw(rows, seed=2).to(stat)  # or float16 gets subnormal
    if case == 2:
        coefficient = coefficient[:1].expand(rows)

    exact = z.double().clone()
    exact = (exact if bias is None else exact + bias.double()).requires_grad_()
    expected = losses_of(exact, (anchor if index is None else anchor[index]).double(), spec)
    (gradient,) = torch.autograd.grad(expected, exact, coefficient.double())
    expected = expected.detach()

    kept_z, kept_anchor = z.clone(), anchor.clone()
    losses = empty(rows, dtype=stat)
    BACKEND.token_losses(LossChunk(z, bias, anchor, index, losses), spec)
    assert relative_error(losses, expected) < BOUND[stat]
    assert torch.equal(z, kept_z)

    again, dz = empty(rows, dtype=stat), z if in_place else empty(*shape, dtype=dtype)
    sums, all_sums = draw(columns, dtype=stat, seed=3), gradient.sum(0)
    BACKEND.token_losses(LossChunk(z, bias, anchor, index, again, coefficient, dz, sums), spec)
    assert torch.equal(again, losses)
    assert relative_error(dz, gradient) < BOUND[dtype]
    assert relative_error(sums, all_sums) < 2 * BOUND[stat]
    assert torch.equal(anchor, kept_anchor) and (in_place or torch.equal(z, kept_z))

    without = empty(*shape, dtype=dtype)
    BACKEND.token_losses(
        LossChunk(kept_z, bias, anchor, index, again, coefficient, without, None), spec
    )
    assert torch.equal(without, dz) and torch.equal(again, losses)


@pytest.mark.parametrize("in_blocks", (False, True))
def test_no_cancellation_near_the_anchor(in_blocks: bool) -> None:
    """At a distance of 1e-4 the loss is flat to 5e-9, and its gradient 1e-4 times that of noise."""
    t = draw(3, 200)
    z = 3 * t + 3e-4 * draw(3, 200, seed=1)
    spec = Spec("gelu", "cosine", "none", 1e-8, torch.float32)
    exact = z.double().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses_of(exact, t.double(), spec).sum(), exact)
    ones = torch.ones(3, device=DEVICE)
    with registers(16 if in_blocks else 65536):
        dz, losses = empty(3, 200), empty(3)
        BACKEND.token_losses(LossChunk(z, None, t, None, losses, ones, dz, None), spec)
        assert relative_error(dz, gradient) < 1e-3
        BACKEND.token_losses(LossChunk(t, None, t, None, losses, ones, dz, None), spec)
        assert torch.equal(dz, torch.zeros_like(dz)), "z = t"


@pytest.mark.parametrize("in_blocks", (False, True))
def test_zero_target(in_blocks: bool) -> None:
    with registers(16 if in_blocks else 65536):
        check_zero_target(BACKEND, DEVICE)


@pytest.mark.parametrize(("loss", "normalize"), KINDS)
@pytest.mark.parametrize("in_blocks", (False, True))
def test_nan_and_zeros(loss: str, normalize: str, in_blocks: bool) -> None:
    """NaN goes where PyTorch lets it go, and a row of zeros gives what it gives there."""
    z, t = draw(6, 140), draw(6, 140, seed=1)
    z[1, 3] = t[2, 135] = math.nan
    z[3], t[4] = 0, 0
    spec = Spec("gelu", loss, normalize, 1e-8, torch.float32)
    coefficient, results = torch.ones(6, device=DEVICE), []
    with registers(16 if in_blocks else 65536):
        for backend in (TorchBackend(), BACKEND):
            losses, dz, sums = empty(6), empty(6, 140), torch.zeros(140, device=DEVICE)
            backend.token_losses(LossChunk(z, None, t, None, losses, coefficient, dz, sums), spec)
            results.append((losses, dz, sums))
    for expected, ours in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), expected.isnan())
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert results[1][0].isnan().tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_nan_through_activations(activation: str) -> None:
    u, dg = draw(3, 40), draw(3, 40, seed=1)
    u[0, 3] = dg[1, 39] = math.nan
    results = []
    for backend in (TorchBackend(), BACKEND):
        g, du, sums = empty(3, 40), dg.clone(), torch.zeros(40, device=DEVICE)
        backend.activate(u, None, activation, g)
        backend.activation_backward(du, u, None, activation, sums)
        results.append((g, du, sums))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("in_blocks", (False, True))
def test_fewer_programs_than_rows(monkeypatch: pytest.MonkeyPatch, in_blocks: bool) -> None:
    """As in a large chunk, where each sums up several rows: right, and bitwise repeatable."""
    monkeypatch.setattr(config, "resident", lambda num_warps, multiprocessors: 3)
    assert config.loss_row(13, 140, 4, True, 4).programs == 3
    spec = Spec("gelu", "cosine", "none", 1e-8, torch.float32)
    z, t = draw(13, 140, dtype=torch.bfloat16), draw(13, 140, seed=1)
    coefficient, runs = torch.ones(13, device=DEVICE), []
    with registers(16 if in_blocks else 65536):
        _check_losses((13, 140), spec, case=2, in_place=True, has_bias=True)
        for _ in range(2):
            losses, dz, sums = empty(13), z.clone(), torch.zeros(140, device=DEVICE)
            BACKEND.token_losses(LossChunk(dz, None, t, None, losses, coefficient, dz, sums), spec)
            runs.append((losses, dz, sums))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_fewer_programs_than_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "resident", lambda num_warps, multiprocessors: 3)
    assert config.programs_along_rows(130, 33, config.tile(33), 4) == 3
    test_activations((130, 33), torch.float32, "silu")
    sums, once = torch.zeros(33, device=DEVICE), torch.zeros(33, device=DEVICE)
    u, dg = draw(130, 33), draw(130, 33, seed=1)
    BACKEND.activation_backward(dg.clone(), u, None, "gelu", sums)
    BACKEND.activation_backward(dg.clone(), u, None, "gelu", once)
    assert torch.equal(sums, once)


def test_more_row_blocks_than_a_grid_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "MOST_PROGRAMS", 2)
    assert config.grid(130, 33, config.tile(33))[1:] == (2, 3)
    test_gather_rows((130, 33), "contiguous", True)
    test_scatter_rows((130, 33), True, "another")
    test_activations((130, 33), torch.float32, "gelu")


def test_nothing_is_launched_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from prereg_kernels.ops.backends.triton import activation, gather, loss, scatter, sums

    for module in (activation, gather, loss, scatter, sums):
        monkeypatch.setattr(module, "launch", None)
    none, x, vector = draw(0, 4), draw(3, 4), draw(4)
    of_du, of_dz = vector.clone(), vector.clone()
    index = torch.empty(0, dtype=torch.int64, device=DEVICE)
    spec = Spec("gelu", "cosine", "none", 1e-8, torch.float32)
    BACKEND.gather_rows(x, index, none)
    BACKEND.activate(none, vector, "gelu", none)
    BACKEND.activation_backward(none, none, None, "gelu", of_du)
    BACKEND.token_losses(LossChunk(none, None, x, index, draw(0)), spec)
    BACKEND.token_losses(LossChunk(none, None, x, index, draw(0), draw(0), none, of_dz), spec)
    BACKEND.scatter_rows(none, x, index, None, x)
    assert torch.equal(torch.stack([of_du, of_dz]), torch.zeros(2, 4, device=DEVICE))


def test_launches_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from prereg_kernels.ops.backends.triton import compiled, launch

    events: list[Any] = []
    current = 0

    @contextmanager
    def current_device(device: torch.device) -> Iterator[None]:
        nonlocal current
        before, current = current, device.index
        events.append(("enter", device.index))
        yield
        events.append("leave")
        current = before

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: events.append((grid, kwargs["num_warps"]))

    monkeypatch.setattr(torch.cuda, "device", current_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(launch, "launch_compiled", lambda *args: ())
    device = torch.device("cuda", 3)
    tensor = SimpleNamespace(is_cuda=True, device=device, get_device=lambda: 3)
    for before, first in ((0, tensor), (3, tensor), (0, torch.zeros(1))):
        current = before
        launch.launch(Kernel(), (7, 1, 1), compiled.Variant(4), (first,), (1,))
        if first is tensor and before == 0:
            assert events == [("enter", 3), ((7, 1, 1), 4), "leave"]
        else:
            assert events == [((7, 1, 1), 4)]
        events.clear()


def test_a_second_call_has_no_other_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found by identity: with a new one each launch would go Triton's own way."""
    from prereg_kernels import fused_pre_loss, pre_tap
    from prereg_kernels.ops.backends.triton import launch

    seen: list[Any] = []

    def launch_compiled(*arguments: Any) -> tuple[()]:
        seen.append(arguments[-1])
        return ()

    monkeypatch.setattr(launch, "launch_compiled", launch_compiled)
    weights, biases = (draw(4, 4), draw(4, 4)), (draw(4), draw(4))
    index = torch.arange(4, device=DEVICE)
    for function in (fused_pre_loss, pre_tap):
        variants = []
        for seed in (0, 1):
            seen.clear()
            hidden = draw(6, 4, seed=seed).requires_grad_()
            given = hidden, draw(6, 4), weights, biases
            found = function(*given, visual_index=index, backend="triton")
            (found if function is fused_pre_loss else found[0].sum() + found[1]).backward()
            variants.append([*seen])
        assert len(variants[0]) > 2
        assert all(x is y for x, y in zip(*variants, strict=True))


@pytest.mark.skipif(not interpreting(), reason="a failed assertion ends the use of a GPU")
@pytest.mark.parametrize("row", (-1, 3))
def test_index_out_of_range(row: int) -> None:
    x, index = draw(3, 4), torch.tensor([0, row])
    spec = Spec("gelu", "cosine", "none", 1e-8, torch.float32)
    with pytest.raises(Exception, match="visual_index out of range"):
        BACKEND.gather_rows(x, index, empty(2, 4))
    with pytest.raises(Exception, match="visual_index out of range"):
        BACKEND.scatter_rows(draw(2, 4), x, index, None, x)
    with pytest.raises(Exception, match="visual_index out of range"):
        BACKEND.token_losses(LossChunk(draw(2, 4), None, x, index, empty(2)), spec)
