# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of the loss, beside the bare matmuls (`floor`).

Each peer's results are compared with the definition's, in float64, before it is timed: a wrong one
fails. All peers of a case that were selected run in turn, round by round, so that whatever slows
the machine down slows all of them. pytest-benchmark then gets the measured times one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.common.program import Session
from benchmarks.common.replay import REPLAY
from benchmarks.common.report import Json
from benchmarks.common.timing import make_clock
from benchmarks.loss.checks import is_emulated
from benchmarks.loss.cpu import CPU
from benchmarks.loss.measure import run_case
from benchmarks.loss.plans import CPU_PLANS, FLOOR, GPU_PLANS, TINY, Plan, threads
from benchmarks.loss.suite import cells, describe

THREADS = 2  # of a CPU
PATIENCE = 10.0  # no budget here: a compiler on a busy machine may take its time
pytestmark = pytest.mark.benchmark(timer=REPLAY.clock)
Measure = Callable[[Plan], Json]


def cannot(plan: Plan, name: str, device: torch.device) -> str | None:
    """Why it is not timed."""
    if is_emulated(plan.case.dtype, device) and name != FLOOR and not plan.peers()[name].ours:
        return f"this CPU emulates products of {plan.case.dtype}: a step would take minutes"
    return None


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, is_tiny: bool, sized: Any) -> Measure:
    """The record of a plan's peers that were selected, measured when the first of them runs."""
    records: dict[Plan, Json] = {}
    selected = [
        tuple(item.callspec.params.values())
        for item in request.session.items
        if getattr(item, "originalname", "") == test_forward_and_backward.__name__
    ]

    def measure(plan: Plan) -> Json:
        if plan not in records:
            device = torch.device("cuda" if plan.is_of_gpu and not is_tiny else "cpu")
            wanted = {name for p, name in selected if p == plan and not cannot(p, name, device)}
            peers = [peer for name, peer in plan.peers(is_tiny).items() if name in wanted]
            session = Session(make_clock(device), math.inf, PATIENCE)
            effort = TINY if is_tiny else plan.effort
            record: Json = {"device": device}
            with threads(1 if is_tiny else THREADS):
                run_case(
                    session, sized(plan.case), peers, effort, record, by_the_rule=device != CPU
                )
            records[plan] = record
        return records[plan]

    return measure


@pytest.mark.parametrize(("plan", "name"), cells((*CPU_PLANS, *GPU_PLANS)))
def test_forward_and_backward(benchmark: Any, measured: Measure, plan: Plan, name: str) -> None:
    if not plan.is_of_gpu and (reason := cannot(plan, name, CPU)):
        pytest.skip(reason)
    record = measured(plan)
    found = record["variants"][name]
    if found["status"] == "skipped":  # its package is missing, or it does not fit
        pytest.skip(found["reason"])
    assert found["status"] == "ok", f"{name}: {found['reason']}"
    benchmark.group = plan.case.name
    benchmark.extra_info |= describe(record["device"], plan.case, name, THREADS)
    benchmark.extra_info["emulated"] = is_emulated(plan.case.dtype, record["device"])
    keys = ("ratio_to_floor", "peak_bytes", "held_bytes", "scratch_bytes", "check")
    benchmark.extra_info |= {key: found[key] for key in keys if key in found}
    REPLAY.milliseconds(benchmark, found["samples_ms"])
