# SPDX-License-Identifier: Apache-2.0
"""What a profiler sees of a call, and that nobody pays for it where there is none."""

from __future__ import annotations

import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from prereg_kernels import fused_pre_loss
from prereg_kernels.ops import custom_ops, ranges
from prereg_kernels.ops.backends.base import Backend
from prereg_kernels.ops.backends.torch import TorchBackend
from prereg_kernels.ops.ranges import STAGES, with_ranges
from tests.helpers import make_problem, residual_like, run, run_tap

# Of a head of two layers, in a chunk; the loss alone has but the first five
STAGES_OF_A_CALL = {
    "linear_activate": 1, "activate": 1, "linear_losses": 1, "token_losses": 1, "linear": 2,
    "add_product": 2, "linear_backward_activation": 1, "activation_backward": 1,
    "linear_backward_scatter": 1,
}  # fmt: skip
CHUNKS = 2  # 14 rows


def ranges_of(events: list[tuple[str, float, float]]) -> dict[str, int]:
    """How often each stage was seen."""
    names = [name.removeprefix("prereg::") for name, *_ in events]
    return {name: names.count(name) for name in names if name in STAGES}


def profiled(call: object) -> list[tuple[str, float, float]]:
    """(name, begin, end) of what a profiler sees."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()  # type: ignore[operator]
    return [(e.name, e.time_range.start, e.time_range.end) for e in seen.events()]


@pytest.mark.parametrize("what", ("loss", "tap"))
def test_a_profiler_sees_every_stage_within_its_op(what: str) -> None:
    problem = make_problem()
    calls = {
        "loss": lambda: run(fused_pre_loss, problem, chunk_rows=7),
        "tap": lambda: run_tap(problem, 0.5, residual_like(problem.hidden), chunk_rows=7),
    }
    events = profiled(calls[what])
    found = ranges_of(events)
    expected = {name: CHUNKS * count for name, count in STAGES_OF_A_CALL.items()}
    assert {name: found.get(name) for name in expected} == expected
    [op] = [event for event in events if event[0] == "prereg::pre_gradients"]
    for name, begin, end in events:
        if name.removeprefix("prereg::") in STAGES:
            assert op[1] <= begin <= end <= op[2], name


def test_the_numbers_are_the_same() -> None:
    problem = make_problem()
    plain = run(fused_pre_loss, problem, chunk_rows=7)
    with profile(activities=[ProfilerActivity.CPU]):
        seen = run(fused_pre_loss, problem, chunk_rows=7)
    assert plain.keys() == seen.keys()
    assert all(torch.equal(value, seen[name]) for name, value in plain.items())


def test_without_a_profiler_a_call_gets_the_backend_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a profiler, and after one."""
    got: list[tuple[Backend, Backend]] = []

    def look(backend: Backend) -> Backend:
        got.append((backend, with_ranges(backend)))
        return got[-1][1]

    monkeypatch.setattr(custom_ops, "with_ranges", look)
    problem = make_problem()
    run(fused_pre_loss, problem)
    with profile(activities=[ProfilerActivity.CPU]):
        run(fused_pre_loss, problem)
    run(fused_pre_loss, problem)
    assert [backend is given for backend, given in got] == [True, False, True]


def test_what_looking_for_a_profiler_costs() -> None:
    """Less than two microseconds of a call, which takes a hundred and more."""
    backend, best = TorchBackend(), float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(1000):
            with_ranges(backend)
        best = min(best, (time.perf_counter() - begin) / 1000)
    assert best < 2e-6


def test_questions_are_no_stages() -> None:
    assert {name for name in vars(Backend)} > ranges.QUESTIONS
    assert not ranges.QUESTIONS & set(STAGES)
    assert {"gather_rows", "token_losses", "linear_activate", "add_product"} <= set(STAGES)
