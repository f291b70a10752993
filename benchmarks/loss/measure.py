"""One case of the GPU benchmark: check, warm up, measure memory, time; failures stay inside."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.common.timing import (
    Clock,
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
from benchmarks.loss.peers import Floor, Variant, Work
from benchmarks.loss.report import add_ratios, summarize_variant

Json = dict[str, Any]
NOT_TIMED = {"status": "not timed"}
RESERVE = 20.0  # seconds that no peer's compiler may take from the rest


@dataclass
class Session:
    """What the cases share: the device, the time that is left, and what went wrong."""

    clock: Clock
    deadline: float  # of time.monotonic
    problems: list[str] = field(default_factory=list)
    ours_failed: bool = False
    checked: set[tuple[object, ...]] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def failed(self, what: str, reason: str, ours: bool) -> None:
        self.problems.append(f"{what}: {reason}")
        self.ours_failed |= ours

    def attempt(self, what: str, action: Callable[[], None], ours: bool = True) -> None:
        """Record what fails, or does not fit into the time any more, and go on."""
        try:
            if self.remaining() <= 0:
                raise OverBudgetError("skipped, no time left")
            action()
        except OverBudgetError as error:
            self.failed(what, str(error), ours=False)
        except Exception as error:
            self.failed(what, describe_error(error), ours)
        finally:
            self.free()

    def free(self) -> None:
        """Give back what the last case held."""
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # after an illegal access every call raises
                torch.cuda.empty_cache()


def run_case(
    session: Session, case: Case, variants: Sequence[Variant], effort: Effort, record: Json
) -> None:
    """Fill `record` with the case and its variants, in their order."""
    began = time.monotonic()
    torch._dynamo.reset()  # the compilers' memory of other cases
    tensors = make_tensors(case, session.device)
    truth = full_truth(case, tensors)
    floor = Floor(case, tensors)
    steps = {"floor": Measured(floor.step)}
    if not all(variant.grad for variant in variants):
        steps["forward floor"] = Measured(floor.forward)
    summaries: Json = {name: dict(NOT_TIMED) for name in steps}
    record |= case.describe() | {"variants": summaries}
    for measured in steps.values():
        measured.step()
    for variant in variants:
        summaries[variant.name], step = _prepare(session, variant, case, tensors, truth)
        if step is not None:
            steps[variant.name] = step
    times, errors = warm_and_interleave(steps, session.clock, effort)
    for name, samples in times.items():
        summaries[name] |= summarize_variant(samples)
    ours = {variant.name for variant in variants if variant.ours}
    for name, error in errors.items():
        summaries[name] = {"status": "failed", "reason": error}
        session.failed(f"{case.name}, {name}", error, name in ours)
    floor_ms = summaries["floor"].get("median_ms")
    if floor_ms:
        record["floor_tflop_s"] = case.matmul_flops / floor_ms / 1e9
    add_ratios(summaries)
    record["seconds"] = time.monotonic() - began


def _prepare(
    session: Session, variant: Variant, case: Case, tensors: Tensors, truth: FullTruth | None
) -> tuple[Json, Measured | None]:
    """Compile, check, warm up and measure memory: the variant's record, and what to time."""
    began = time.monotonic()
    what = f"{case.name}, {variant.name}"
    allowed = session.remaining() - (0 if variant.ours else RESERVE)
    try:
        with time_limit(min(variant.seconds, allowed)):
            summary, work = _warm_up(session, variant, case, tensors, truth)
    except (OverBudgetError, ImportError) as error:
        session.problems.append(f"{what}: skipped: {error}")
        return {"status": "skipped", "reason": str(error)}, None
    except torch.OutOfMemoryError as error:
        session.free()
        session.failed(what, "out of memory", variant.ours)
        return {"status": "skipped", "reason": describe_error(error)}, None
    except Exception as error:
        session.failed(what, describe_error(error), variant.ours)
        return {"status": "failed", "reason": describe_error(error)}, None
    return summary | {"preparation_s": time.monotonic() - began}, Measured(work.step)


def _warm_up(
    session: Session, variant: Variant, case: Case, tensors: Tensors, truth: FullTruth | None
) -> tuple[Json, Work]:
    key = (variant.name, case.widths, case.dtype, case.weight_dtype)
    if variant.ours and key not in session.checked:
        check_slice(variant, case, session.device)
        session.checked.add(key)
    work = Work(variant, tensors)
    summary: Json = dict(NOT_TIMED)
    if truth is not None:
        summary["check"] = truth.check(work)
    work.step()
    if session.device.type == "cuda":
        memory: Memory = measure_memory(work.forward, work.backward)
        summary |= {"peak_bytes": memory.peak, "held_bytes": memory.held}
        if variant.grad:
            summary["scratch_bytes"] = memory.peak - case.gradient_bytes
    return summary, work


def run_launches(
    session: Session, case: Case, variants: Sequence[Variant], effort: Effort, records: list[Json]
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
    for variant in variants:
        step, name = Work(variant, tensors).step, variant.name
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
