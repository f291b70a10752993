# SPDX-License-Identifier: Apache-2.0
"""Stages by quack-kernels, where it is installed: the rule, and what we hold its signatures for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from prereg_kernels.ops import custom_ops
from prereg_kernels.ops.backends.triton.fused import quack
from tests.gpu.support import DEVICE, HALVES, gpu_problem, needs_gpu
from tests.helpers import check, check_tap, residual_like
from tests.ops.backends import quack_signatures

pytest.importorskip("quack", reason="needs quack-kernels")
pytestmark = needs_gpu


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures() -> None:
    found = quack.find_quack()
    assert found is not None
    for name in found._fields:
        ours, theirs = getattr(quack_signatures, name), getattr(found, name)
        assert parameters_of(ours) == parameters_of(theirs), name
    ours = quack_signatures.dact_dbias_mod("gelu_erf")
    assert parameters_of(ours) == parameters_of(found.dact_dbias_mod("gelu_erf").__call__)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rule(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    if not quack._is_new_enough(DEVICE):
        pytest.skip("needs Hopper or Blackwell")
    monkeypatch.setattr(custom_ops, "choose_backend", lambda *_: quack.QuackBackend())
    problem = gpu_problem(1000, (96, 160, 264), dtype=dtype)
    check(problem, chunk_rows=384)
    check_tap(problem, 0.37, residual_like(problem.hidden), chunk_rows=384)
