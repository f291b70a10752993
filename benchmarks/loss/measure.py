# SPDX-License-Identifier: Apache-2.0
"""One case of the benchmark: check, warm up, measure memory, time; failures stay inside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.common.program import Session
from benchmarks.common.report import Json, summarize_variant
from benchmarks.common.timing import (
    Effort,
    Measured,
    Memory,
    OverBudgetError,
    Step,
    describe_error,
    graph_replay,
    measure_memory,
    time_limit,
    time_one,
    warm_and_interleave,
)
from benchmarks.loss.cases import Case, Tensors, make_tensors
from benchmarks.loss.checks import FullTruth, check_slice, full_truth
from benchmarks.loss.peers import Peer
from benchmarks.loss.report import add_ratios
from benchmarks.loss.work import Floor, Work, floor_of

NOT_TIMED = {"status": "not timed"}
RESERVE = 20.0  # seconds that no peer's compiler may take from the rest


def run_case(
    session: Session,
    case: Case,
    peers: Sequence[Peer],
    effort: Effort,
    record: Json,
    by_the_rule: bool = True,
) -> None:
    """Fill `record` with the case and its peers, in their order.

    by_the_rule: hold ours to the tests' rule, too, in which the errors are at most eager's.
    """
    began = time.monotonic()
    torch._dynamo.reset()  # the compilers' memory of other cases
    tensors = make_tensors(case, session.device)
    truth = full_truth(case, tensors)
    floor = floor_of(case, tensors)
    steps = {"floor": Measured(floor.step)}
    if not all(peer.grad for peer in peers):
        steps["forward floor"] = Measured(floor.forward)
    summaries: Json = {name: dict(NOT_TIMED) for name in steps}
    record |= case.describe() | {"variants": summaries}
    for measured in steps.values():
        measured.step()
    for peer in peers:
        prepare = partial(_warm_up, session, peer, case, tensors, truth, by_the_rule)
        summaries[peer.name], step = _prepare(session, peer, case, prepare)
        if step is not None:
            steps[peer.name] = step
    times, errors = warm_and_interleave(steps, session.clock, effort)
    for name, samples in times.items():
        summaries[name] |= summarize_variant(samples)
    ours = {peer.name for peer in peers if peer.ours}
    for name, error in errors.items():
        summaries[name] = {"status": "failed", "reason": error}
        session.failed(f"{case.name}, {name}", error, name in ours)
    floor_ms = summaries["floor"].get("median_ms")
    if floor_ms:
        record["floor_tflop_s"] = case.matmul_flops / floor_ms / 1e9
    add_ratios(summaries)
    record["seconds"] = time.monotonic() - began


def _prepare(
    session: Session, peer: Peer, case: Case, warm_up: Callable[[], tuple[Json, Work]]
) -> tuple[Json, Measured | None]:
    """Compile, check, warm up and measure memory: the peer's record, and what to time."""
    began = time.monotonic()
    what = f"{case.name}, {peer.name}"
    allowed = session.remaining() - (0 if peer.ours else RESERVE)
    try:
        with time_limit(min(session.patience * peer.first_call_seconds, allowed)):
            summary, work = warm_up()
    except (OverBudgetError, ImportError) as error:
        session.problems.append(f"{what}: skipped: {error}")
        return {"status": "skipped", "reason": str(error)}, None
    except torch.OutOfMemoryError as error:
        session.free()
        session.failed(what, "out of memory", peer.ours)
        return {"status": "skipped", "reason": describe_error(error)}, None
    except Exception as error:
        session.failed(what, describe_error(error), peer.ours)
        return {"status": "failed", "reason": describe_error(error)}, None
    return summary | {"preparation_s": time.monotonic() - began}, Measured(work.step)


def _warm_up(
    session: Session,
    peer: Peer,
    case: Case,
    tensors: Tensors,
    truth: FullTruth | None,
    by_the_rule: bool,
) -> tuple[Json, Work]:
    key = (peer.name, case.widths, case.dtype, case.weight_dtype)
    if by_the_rule and peer.ours and key not in session.checked:
        check_slice(peer, case, session.device)
        session.checked.add(key)
    work = Work(peer, tensors)
    summary: Json = dict(NOT_TIMED)
    if truth is not None:
        summary["check"] = truth.check(work)
    work.step()
    if session.device.type == "cuda":
        memory: Memory = measure_memory(work.forward, work.backward)
        summary |= {"peak_bytes": memory.peak, "held_bytes": memory.held}
        if peer.grad:
            summary["scratch_bytes"] = memory.peak - case.gradient_bytes
    return summary, work


def run_launches(
    session: Session, case: Case, peers: Sequence[Peer], effort: Effort, records: list[Json]
) -> None:
    """The cost of launching: a CUDA graph's replay, a stream kept busy, and an idle device."""
    tensors = make_tensors(case, session.device)
    floor = Floor(case, tensors)

    def launch(name: str, step: Step) -> None:
        stream = time_one(step, session.clock, effort)
        idle = time_one(step, session.clock, effort, head_start=False)
        replay = graph_replay(step) if session.device.type == "cuda" else step
        graph = time_one(replay, session.clock, effort)
        samples = {"graph_ms": graph, "stream_ms": stream, "idle_ms": idle}
        medians = {kind: statistics.median(values) for kind, values in samples.items()}
        records.append({"case": case.name, "name": name, **medians, "samples_ms": samples})

    session.attempt(f"launches of {case.name}, floor", lambda: launch("floor", floor.step))
    for peer in peers:
        step, name = Work(peer, tensors).step, peer.name
        session.attempt(f"launches of {case.name}, {name}", partial(launch, name, step))


def measure_ceilings(session: Session, effort: Effort, tiny: bool) -> Json:
    """The rates that nothing here can exceed: of a copy in the device, and of a matmul."""
    device, clock = session.device, session.clock
    elements, size = (2**16, 64) if tiny else (2**30, 8192)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copies = time_one(lambda: target.copy_(source), clock, effort)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matmuls = time_one(lambda: torch.mm(a, b, out=out), clock, effort)
    return {
        "copy_bytes": 4 * elements,  # 2 read and 2 written an element
        "copy_gb_s": 4 * elements / statistics.median(copies) / 1e6,
        "copy_samples_ms": copies,
        "matmul_size": size,
        "matmul_tflop_s": 2 * size**3 / statistics.median(matmuls) / 1e9,
        "matmul_samples_ms": matmuls,
    }
