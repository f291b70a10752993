# SPDX-License-Identifier: Apache-2.0
"""The fused matmuls against formulas in float64: interpreted on a CPU, or on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/ops/backends/test_triton_matmul.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.ops import custom_ops, dtypes
from prereg_kernels.ops.activations import ACTIVATIONS
from prereg_kernels.ops.backends.base import LossChunk
from prereg_kernels.ops.backends.triton.backend import TritonBackend, interpreting, unavailable
from prereg_kernels.ops.backends.triton.fused import stages
from prereg_kernels.ops.backends.triton.fused.matmul_config import (
    EVERYTHING,
    SINGLE,
    STAGES,
    TWIN,
    WIDE,
    FusionPlan,
    MatmulConfig,
    candidates,
    choose_config,
)
from prereg_kernels.ops.backends.triton.fused.stages import FusedStages, FusedTritonBackend
from prereg_kernels.ops.spec import Spec
from tests.helpers import KERNEL_ACTIVATIONS, Problem, check, make_problem, relative_error

DEVICE = torch.device("cpu" if interpreting() or not torch.cuda.is_available() else "cuda")
RUNS = unavailable(DEVICE.type) is None and (
    DEVICE.type == "cpu" or stages._gpu(DEVICE)[0] >= (9, 0)
)
needs_triton = pytest.mark.skipif(not RUNS, reason="needs TRITON_INTERPRET=1, or a GPU with TMA")

# Many tiles, a group of rows that is not full, several tiles a program: in little time
SMALL = MatmulConfig(
    32, 32, 16, 4, 2, parts=2, programs=1, max_registers=None, flatten=True, group_m=3
)
QUARTERS = replace(SMALL, block_m=64, block_n=64, block_k=32, parts=4)
BACKEND = FusedTritonBackend(EVERYTHING, SMALL)
PLAIN = TritonBackend()
# n, K and N: below, at and above the tiles' sizes; K and N are ragged, but aligned
SHAPES = ((1, 8, 8), (127, 40, 72), (128, 16, 64), (129, 72, 40), (33, 24, 104))
# The interpreter truncates to bfloat16
ROUNDING = {torch.bfloat16: 2**-7 if DEVICE.type == "cpu" else 2**-8, torch.float16: 2**-11}
each_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_activation = pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
with_bias = pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers in a larger tensor of NaN: whoever reads beyond the edges shows."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return guarded(*shape, dtype=dtype).copy_(values)


def guarded(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaN, in the middle of a larger tensor of NaN: see `assert_untouched_around`."""
    if len(shape) == 1:
        return torch.full((shape[0] + 16,), math.nan, dtype=dtype, device=DEVICE)[8:-8]
    whole = torch.full((shape[0] + 2, shape[1] + 16), math.nan, dtype=dtype, device=DEVICE)
    return whole[1:-1, 8:-8]


def assert_untouched_around(x: Tensor) -> None:
    """Nothing is written beyond the edges, and everything within."""
    whole = x._base
    assert whole is not None
    assert not x.isnan().any()
    assert whole.isnan().sum() == whole.numel() - x.numel()


def operands(
    shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (n, K), W (N, K) if transposed, else (K, N), and a bias (N,)."""
    rows, inner, columns = shape
    weight = (columns, inner) if transposed else (inner, columns)
    x = draw(rows, inner, dtype=dtype)
    w = draw(*weight, dtype=dtype, seed=1).div_(math.sqrt(inner))
    return x, w, draw(columns, dtype=dtype, seed=2) if bias else None


def some_rows(count: int, of: int) -> Tensor:
    return torch.randperm(of, generator=torch.Generator().manual_seed(3))[:count].to(DEVICE)


def plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.double()


def assert_rounded(value: Tensor, truth: Tensor) -> None:
    """Equal up to one rounding, and those of the sum in float32."""
    bound = {"rtol": ROUNDING[value.dtype], "atol": 1e-5}
    torch.testing.assert_close(value.double(), truth, **bound)


def assert_float32(value: Tensor, truth: Tensor) -> None:
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), truth, rtol=2e-6, atol=2e-6)


def spec_of(loss: str, dtype: torch.dtype, **options: Any) -> Spec:
    return Spec("gelu", loss, options.pop("normalize", "none"), 1e-8, dtype, **options)


def losses_of(z: Tensor, t: Tensor, loss: str) -> Tensor:
    if loss == "cosine":
        return -F.cosine_similarity(z, t, dim=1)
    function = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}[loss]
    return function(z, t, reduction="none").mean(dim=1)


def slope(u: Tensor, activation: str) -> Tensor:
    leaf = u.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS.find(activation)(leaf).sum(), leaf)[0]


def activate(
    backend: FusedStages,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bias: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u and g, and what they should be."""
    x, w, b = operands(shape, dtype, True, bias)
    u, g = (guarded(shape[0], shape[2], dtype=dtype) for _ in "ug")
    backend.linear_activate(x, w, b, activation, u, g)
    true = plus(x.double() @ w.double().T, b)
    return u, g, true, ACTIVATIONS.find(activation)(true)


@needs_triton
class TestLinearActivate:
    @each_dtype
    @each_shape
    @with_bias
    def test_shapes(self, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
        u, g, true_u, true_g = activate(BACKEND, shape, dtype, bias, "gelu")
        assert_rounded(u, true_u)
        assert_rounded(g, true_g)
        assert_untouched_around(u)
        assert_untouched_around(g)

    @each_activation
    @with_bias
    def test_activations(self, activation: str, bias: bool) -> None:
        u, g, true_u, true_g = activate(BACKEND, (33, 40, 72), torch.bfloat16, bias, activation)
        assert_rounded(u, true_u)
        assert_rounded(g, true_g)

    def test_one_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from prereg_kernels.ops.backends.triton.fused import matmul_launch

        launch, stored = matmul_launch._launch, []

        def note(*args: Any, **constants: Any) -> None:
            stored.append(constants["STORE_U"])
            launch(*args, **constants)

        monkeypatch.setattr(matmul_launch, "_launch", note)
        x, w, b = operands((65, 24, 40), torch.bfloat16, True, True)
        g = guarded(65, 40, dtype=torch.bfloat16)
        BACKEND.linear_activate(x, w, b, "silu", g, g)
        assert_rounded(g, F.silu(plus(x.double() @ w.double().T, b)))
        assert_untouched_around(g)
        assert stored == [False]  # stored first, u would race with g


@needs_triton
class TestLinearLosses:
    @pytest.mark.parametrize("loss", ("cosine", "mse", "smooth_l1", "l1"))
    @each_shape
    @pytest.mark.parametrize("indexed", (True, False), ids=("index", "no index"))
    def test_shapes(self, shape: tuple[int, int, int], loss: str, indexed: bool) -> None:
        dtype = torch.float16 if loss == "mse" else torch.bfloat16
        x, w, b = operands(shape, dtype, True, indexed)
        rows, _, columns = shape
        index = some_rows(rows, rows + 5) if indexed else None
        anchor = draw(rows + 5 if indexed else rows, columns, dtype=dtype, seed=4)
        z, losses = guarded(rows, columns, dtype=dtype), guarded(rows, dtype=torch.float32)
        BACKEND.linear_losses(
            x, w, b, LossChunk(z, None, anchor, index, losses), spec_of(loss, dtype)
        )
        t = anchor if index is None else anchor[index]
        true = losses_of(plus(x.double() @ w.double().T, b), t.double(), loss)
        assert_float32(losses, true)
        assert_untouched_around(losses)
        assert z.isnan().all()  # the prediction is not written

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
    def test_anchor_of_another_dtype(self, dtype: torch.dtype) -> None:
        x, w, b = operands((40, 24, 40), torch.bfloat16, True, True)
        anchor, losses = draw(40, 40, dtype=dtype, seed=4), guarded(40, dtype=torch.float32)
        z = guarded(40, 40, dtype=torch.bfloat16)
        BACKEND.linear_losses(
            x, w, b, LossChunk(z, None, anchor, None, losses), spec_of("cosine", torch.bfloat16)
        )
        assert_float32(
            losses, losses_of(plus(x.double() @ w.double().T, b), anchor.double(), "cosine")
        )

    def test_cosine_of_zeros_and_of_short_rows(self) -> None:
        x, w, _ = operands((3, 16, 40), torch.bfloat16, True, False)
        anchor, losses = draw(3, 40, dtype=torch.bfloat16, seed=4), guarded(3, dtype=torch.float32)
        x[0] = 0
        anchor[1] = 0
        x[2] *= 1e-12
        z = guarded(3, 40, dtype=torch.bfloat16)
        BACKEND.linear_losses(
            x, w, None, LossChunk(z, None, anchor, None, losses), spec_of("cosine", torch.bfloat16)
        )
        short = (x[2].double() @ w.double().T @ anchor[2].double()) / anchor[2].double().norm()
        assert losses[0] == losses[1] == 0
        torch.testing.assert_close(losses[2].double(), -short / 1e-8, rtol=1e-5, atol=0)

    def test_nan_stays_in_its_row(self) -> None:
        x, w, _ = operands((40, 16, 40), torch.bfloat16, True, False)
        anchor, losses = (
            draw(40, 40, dtype=torch.bfloat16, seed=4),
            guarded(40, dtype=torch.float32),
        )
        x[7, 3] = math.nan
        z = guarded(40, 40, dtype=torch.bfloat16)
        BACKEND.linear_losses(
            x, w, None, LossChunk(z, None, anchor, None, losses), spec_of("cosine", torch.bfloat16)
        )
        assert losses.isnan().nonzero().tolist() == [[7]]


def backward(
    backend: FusedStages,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bias: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """du and the sums, and what they should be."""
    d, w, b = operands(shape, dtype, False, bias)
    u, du = draw(shape[0], shape[2], dtype=dtype, seed=5), guarded(shape[0], shape[2], dtype=dtype)
    sums = torch.ones(shape[2], device=DEVICE)
    backend.linear_backward_activation(d, w, u, b, activation, du, sums)
    true = (d.double() @ w.double()) * slope(u.double(), activation)
    return du, sums, true, true.sum(dim=0)


@needs_triton
class TestLinearBackwardActivation:
    @each_dtype
    @each_shape
    @with_bias
    def test_shapes(self, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
        du, sums, true_du, true_sums = backward(BACKEND, shape, dtype, bias, "gelu")
        assert_rounded(du, true_du)
        torch.testing.assert_close(sums.double(), true_sums, rtol=1e-5, atol=2e-5)
        assert_untouched_around(du)

    @each_activation
    def test_activations(self, activation: str) -> None:
        du, sums, true_du, true_sums = backward(
            BACKEND, (65, 40, 72), torch.float16, True, activation
        )
        assert_rounded(du, true_du)
        torch.testing.assert_close(sums.double(), true_sums, rtol=1e-5, atol=2e-5)

    def test_no_sums(self) -> None:
        d, w, b = operands((33, 16, 40), torch.bfloat16, False, True)
        u, du = draw(33, 40, dtype=torch.bfloat16, seed=5), guarded(33, 40, dtype=torch.bfloat16)
        BACKEND.linear_backward_activation(d, w, u, b, "relu", du, None)
        assert_rounded(du, (d.double() @ w.double()) * slope(u.double(), "relu"))


@needs_triton
class TestLinearBackwardScatter:
    @each_shape
    @pytest.mark.parametrize("indexed", (True, False), ids=("index", "no index"))
    @pytest.mark.parametrize("scaled", (True, False), ids=("scale", "no scale"))
    @pytest.mark.parametrize("accumulate", (True, False), ids=("add", "set"))
    def test_cases(
        self, shape: tuple[int, int, int], indexed: bool, scaled: bool, accumulate: bool
    ) -> None:
        dtype = torch.float16 if scaled else torch.bfloat16
        d, w, _ = operands(shape, dtype, False, False)
        rows, _, columns = shape
        into_dtype = torch.float32 if indexed and scaled else dtype
        total = rows + 3 if indexed else rows
        into = guarded(total, columns, dtype=into_dtype)
        before = into.clone()
        residual = draw(total, columns, dtype=into_dtype, seed=6) if accumulate else None
        index = some_rows(rows, total) if indexed else torch.arange(rows, device=DEVICE)
        scale = torch.tensor(0.25, device=DEVICE) if scaled else None
        scratch = guarded(rows, columns, dtype=dtype)
        BACKEND.linear_backward_scatter(
            d, w, into, index if indexed else None, scale, residual, scratch
        )
        true = (d.double() @ w.double()) * (0.25 if scaled else 1)
        true = true if residual is None else true + residual[index].double()
        if into_dtype == torch.float32:
            assert_float32(into[index], true)
        else:
            assert_rounded(into[index], true)
        others = torch.ones(total, dtype=torch.bool, device=DEVICE).index_fill_(0, index, False)
        torch.testing.assert_close(into[others], before[others], rtol=0, atol=0, equal_nan=True)
        if not indexed:
            assert_untouched_around(into)
        assert scratch.isnan().all()


@needs_triton
@pytest.mark.parametrize(
    "config", (WIDE, TWIN, SINGLE, QUARTERS), ids=("wide", "twin", "single", "q")
)
def test_configurations(config: MatmulConfig) -> None:
    backend, shape, dtype = FusedTritonBackend(EVERYTHING, config), (129, 40, 136), torch.bfloat16
    _, g, _, true_g = activate(backend, shape, dtype, True, "relu")
    assert_rounded(g, true_g)
    du, sums, true_du, true_sums = backward(backend, shape, dtype, True, "relu")
    assert_rounded(du, true_du)
    torch.testing.assert_close(sums.double(), true_sums, rtol=1e-5, atol=2e-5)

    x, w, b = operands(shape, dtype, True, True)
    anchor, z = draw(129, 136, dtype=dtype, seed=4), guarded(129, 136, dtype=dtype)
    losses = guarded(129, dtype=torch.float32)
    backend.linear_losses(
        x, w, b, LossChunk(z, None, anchor, None, losses), spec_of("cosine", dtype)
    )
    assert_float32(losses, losses_of(plus(x.double() @ w.double().T, b), anchor.double(), "cosine"))

    d, w, _ = operands(shape, dtype, False, False)
    into = guarded(140, 136, dtype=dtype)
    backend.linear_backward_scatter(d, w, into, some_rows(129, 140), None, None, z)
    assert_rounded(into[some_rows(129, 140)], d.double() @ w.double())


@needs_triton
def test_repeats_bit_for_bit_and_agrees_with_the_plain_stages() -> None:
    """The plain stages round u, dg and z once more before they read them."""
    shape, dtype = (65, 40, 72), torch.float16
    x, w, b = operands(shape, dtype, True, True)
    d, w_back, _ = operands(shape, dtype, False, False)
    anchor, u_back = (draw(65, 72, dtype=dtype, seed=seed) for seed in (4, 5))
    index, scale = some_rows(65, 65), torch.tensor(2.0, device=DEVICE)

    def run(backend: TritonBackend) -> list[Tensor]:
        u, g, z, du, into = (guarded(65, 72, dtype=dtype) for _ in range(5))
        losses, sums = guarded(65, dtype=torch.float32), torch.zeros(72, device=DEVICE)
        backend.linear_activate(x, w, b, "gelu_tanh", u, g)
        backend.linear_losses(
            x, w, b, LossChunk(z, None, anchor, index, losses), spec_of("cosine", dtype)
        )
        backend.linear_backward_activation(d, w_back, u_back, b, "gelu_tanh", du, sums)
        backend.linear_backward_scatter(d, w_back, into, index, scale, None, z)
        return [u, g, losses, du, sums, into]

    first, second, plain = run(BACKEND), run(BACKEND), run(PLAIN)
    for x_first, x_second, x_plain in zip(first, second, plain, strict=True):
        assert torch.equal(x_first, x_second)
        assert relative_error(x_first, x_plain) < 2**-10


class Names(TritonBackend):
    def __init__(self) -> None:
        self.called: list[str] = []

    def linear_activate(self, *args: Any) -> None:
        self.called.append("activate")

    def linear_losses(self, *args: Any) -> None:
        self.called.append("losses")

    def linear_backward_activation(self, *args: Any) -> None:
        self.called.append("backward_activation")

    def linear_backward_scatter(self, *args: Any) -> None:
        self.called.append("backward_scatter")


class Falling(FusedStages, Names):
    def __init__(self, plan: FusionPlan) -> None:
        Names.__init__(self)
        FusedStages.__init__(self, plan, SMALL)


def call_all(backend: Falling, **changes: Any) -> list[str]:
    """The stages that fall back for operands (32, 16) and a weight, but for the changes."""
    dtype = changes.get("dtype", torch.bfloat16)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    x, weight = changes.get("x", zeros(32, 16)), zeros(16, 16)
    u, g, z = zeros(x.shape[0], 16), zeros(x.shape[0], 16), zeros(x.shape[0], 16)
    anchor = changes.get("anchor", zeros(x.shape[0], 16))
    into, scratch = changes.get("into", zeros(x.shape[0], 16)), changes.get("scratch", z)
    spec = changes.get("spec", spec_of("cosine", dtype))
    losses, index = torch.zeros(x.shape[0], device=DEVICE), changes.get("index")
    backend.linear_activate(x, weight, None, "relu", u, g)
    backend.linear_losses(x, weight, None, LossChunk(z, None, anchor, index, losses), spec)
    backend.linear_backward_activation(x, weight, u, None, "relu", g, None)
    backend.linear_backward_scatter(x, weight, into, index, None, None, scratch)
    return backend.called


@needs_triton
class TestFallsBack:
    def test_an_empty_plan_fuses_nothing(self) -> None:
        assert call_all(Falling(FusionPlan())) == list(STAGES)

    @pytest.mark.parametrize("stage", STAGES)
    def test_one_stage_at_a_time(self, stage: str) -> None:
        plan = FusionPlan(**{stage: True})
        assert call_all(Falling(plan)) == [other for other in STAGES if other != stage]

    @pytest.mark.parametrize(
        "x",
        (
            torch.zeros(32, 17, dtype=torch.bfloat16)[:, :16],
            torch.zeros(32, 24, dtype=torch.bfloat16)[:, 1:17],
            torch.zeros(16, 32, dtype=torch.bfloat16).T,
            torch.zeros(1, 16, dtype=torch.bfloat16).expand(32, 16),
            torch.zeros(0, 16, dtype=torch.bfloat16),
            torch.zeros(32, 16, dtype=torch.float16),
        ),
        ids=("row stride", "base", "transposed", "expanded", "empty", "another dtype"),
    )
    def test_operands(self, x: Tensor) -> None:
        assert call_all(Falling(EVERYTHING), x=x.to(DEVICE)) == list(STAGES)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        assert call_all(Falling(EVERYTHING), dtype=dtype) == list(STAGES)

    def test_losses(self) -> None:
        half = torch.bfloat16
        for spec in (
            spec_of("mse", half, normalize="l2"),
            spec_of("smooth_l1", half, normalize="layer"),
        ):
            assert call_all(Falling(EVERYTHING), spec=spec) == ["losses"]
        for anchor in (torch.zeros(16, 32).T, torch.zeros(32, 16, dtype=torch.float64)):
            assert call_all(Falling(EVERYTHING), anchor=anchor.to(DEVICE)) == ["losses"]

    def test_scatter(self) -> None:
        both = ["losses", "backward_scatter"]
        strided = torch.arange(64, device=DEVICE)[::2]
        assert call_all(Falling(EVERYTHING), index=strided) == both
        assert call_all(Falling(EVERYTHING), scratch=None) == ["backward_scatter"]
        into = torch.zeros(16, 32, device=DEVICE).T
        assert call_all(Falling(EVERYTHING), into=into) == ["backward_scatter"]

    def test_gpus_without_the_instructions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for capability in ((8, 0), (8, 9), (12, 0), None):
            monkeypatch.setattr(stages, "_gpu", lambda _, c=capability: (c, 4))
            assert call_all(Falling(EVERYTHING)) == list(STAGES)


def run_fused(monkeypatch: pytest.MonkeyPatch, problem: Problem, **options: Any) -> set[str]:
    """Apply the rule to the whole pipeline, every stage fused; which kernels were launched."""
    from prereg_kernels.ops.backends.triton.fused import matmul_launch

    launched: set[str] = set()
    launch = matmul_launch._launch

    def note(kernel: Any, *args: Any, **constants: Any) -> None:
        launched.add(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(matmul_launch, "_launch", note)
    monkeypatch.setattr(custom_ops, "choose_backend", lambda *_: BACKEND)
    monkeypatch.setattr(dtypes, "_native_on_cpu", lambda _: True)
    check(problem, **options)
    return launched


@pytest.mark.skipif(not interpreting(), reason="tests/gpu does this on GPUs")
class TestPipeline:
    """In float16, to which the interpreter rounds as a GPU does."""

    def test_gradients_with_the_loss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.8
        problem = make_problem((2, 24), (40, 48, 24), dtype=torch.float16, visual_mask=mask)
        launched = run_fused(monkeypatch, problem, chunk_rows=32)
        assert launched == {
            "linear_activate_kernel",
            "linear_backward_activation_kernel",
            "linear_backward_scatter_kernel",
        }

    def test_three_layers_and_the_loss_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        widths = (24, 40, 32, 16)
        problem = make_problem((40,), widths, dtype=torch.float16, activation="silu", loss="mse")
        launched = run_fused(monkeypatch, problem, recompute=True)
        assert "linear_losses_kernel" in launched


class TestConfigurations:
    def test_where_it_runs(self) -> None:
        for stage in STAGES:
            assert candidates(stage, (9, 0)) and candidates(stage, (10, 3))
            for capability in (None, (8, 0), (8, 9), (12, 0)):
                assert candidates(stage, capability) == ()
                assert choose_config(stage, 4096, 4096, 2, capability, 132) is None
            for itemsize in (4, 8):
                assert choose_config(stage, 4096, 4096, itemsize, (9, 0), 132) is None

    def test_tiles_count_whole_blocks(self) -> None:
        assert WIDE.tiles(1, 1) == 1
        assert WIDE.tiles(129, 257) == 4
        assert TWIN.tiles(128, 256) == 2

    def test_wide_tiles_where_they_fill_the_gpu(self) -> None:
        for stage in ("losses", "activate", "backward_scatter"):
            assert choose_config(stage, 18432, 4096, 2, (9, 0), 132) == WIDE

    def test_backward_activation_spills_in_wide_tiles(self) -> None:
        assert choose_config("backward_activation", 18432, 4096, 2, (9, 0), 132) == TWIN

    def test_narrow_tiles_where_wide_ones_leave_it_idle(self) -> None:
        # 132 multiprocessors: 128 narrow tiles, or 64 wide ones
        assert choose_config("losses", 2048, 1024, 2, (9, 0), 132) == SINGLE
        assert choose_config("activate", 4096, 1152, 2, (9, 0), 144) == TWIN

    def test_losses_spill_in_wide_tiles_on_blackwell(self) -> None:
        assert choose_config("losses", 18432, 4096, 2, (10, 0), 148) == SINGLE
