# SPDX-License-Identifier: Apache-2.0
"""Fused stages, each by itself and all together, in every configuration: the same rule.

Which stages are on by default is a matter of speed; here they are forced on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prereg_kernels import fused_pre_loss
from prereg_kernels.ops import custom_ops
from prereg_kernels.ops.backends.base import Backend
from prereg_kernels.ops.gpus import nvidia_capability
from tests.gpu.support import DEVICE, HALVES, assert_same, gpu_problem, needs_gpu
from tests.helpers import check, check_tap, residual_like, run

fused = pytest.importorskip("prereg_kernels.ops.backends.triton.fused.stages")
matmul_config = pytest.importorskip("prereg_kernels.ops.backends.triton.fused.matmul_config")

CAPABILITY = nvidia_capability(DEVICE) if torch.cuda.is_available() else None
pytestmark = [
    needs_gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not matmul_config.candidates("activate", CAPABILITY),
        reason="stages are fused on Hopper and Blackwell",
    ),
]
CONFIGS = (None, matmul_config.WIDE, matmul_config.TWIN, matmul_config.SINGLE)
each_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)


def force(monkeypatch: pytest.MonkeyPatch, plan: Any, config: Any = None) -> list[str]:
    """Make every call use the plan; the list gets the names of the stages that ran fused."""
    seen: list[str] = []

    class Watched(fused.FusedTritonBackend):
        def _choose(self, stage: str, *tensors: torch.Tensor) -> Any:
            chosen = super()._choose(stage, *tensors)
            if chosen is not None:
                seen.append(stage)
            return chosen

    def choose_backend(name: str, device: torch.device, spec: Any = None) -> Backend:
        return Watched(plan, config)

    monkeypatch.setattr(custom_ops, "choose_backend", choose_backend)
    return seen


@each_dtype
@pytest.mark.parametrize("stage", matmul_config.STAGES)
@pytest.mark.parametrize("tokens", (1, 127, 129, 1000))
def test_one_stage(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stage: str, tokens: int
) -> None:
    seen = force(monkeypatch, matmul_config.FusionPlan(**{stage: True}))
    problem = gpu_problem(tokens, (96, 160, 264), dtype=dtype)
    check(problem, chunk_rows=256)
    check(problem, chunk_rows=256, recompute=True)
    check_tap(problem, 0.37, residual_like(problem.hidden), chunk_rows=256)
    assert set(seen) == {stage}


@each_dtype
@pytest.mark.parametrize("config", CONFIGS, ids=("chosen", "wide", "twin", "single"))
@pytest.mark.parametrize("widths", ((96, 160, 264), (512, 768, 512)))
def test_all_stages(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, config: Any, widths: tuple[int, ...]
) -> None:
    if config == matmul_config.TWIN:  # spills in the losses: never chosen for them
        plan = matmul_config.FusionPlan(True, False, True, True)
    else:
        plan = matmul_config.EVERYTHING
    force(monkeypatch, plan, config)
    problem = gpu_problem(1000, widths, dtype=dtype)
    check(problem, chunk_rows=384, recompute=True)
    check_tap(problem, 0.37, residual_like(problem.hidden), chunk_rows=384)


@each_dtype
def test_bitwise_repeatable(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    force(monkeypatch, matmul_config.EVERYTHING)
    problem = gpu_problem(2000, (256, 512, 256), dtype=dtype)
    first = run(fused_pre_loss, problem, chunk_rows=512, recompute=True)
    for _ in range(20):
        assert_same(first, run(fused_pre_loss, problem, chunk_rows=512, recompute=True))
