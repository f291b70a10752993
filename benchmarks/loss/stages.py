# SPDX-License-Identifier: Apache-2.0
"""Each stage that can be fused, with every tile configuration, against cuBLAS and a row kernel."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.timing import Clock, Effort, Measured, describe_error, warm_and_interleave
from benchmarks.loss.kernels import Buffers
from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.gpus import nvidia_capability
from tests.helpers import relative_error

APART = "apart"
TOLERANCE = 0.02  # relative, of two roundings to bfloat16 at different places


@dataclass(frozen=True)
class Stage:
    """A matmul (rows, inner) x (inner, columns) and its neighbour, as the pipeline calls them."""

    name: str  # in a FusionPlan
    columns: int
    inner: int
    step: Callable[[Backend], None]
    outputs: Callable[[], list[Tensor]]


def stages(b: Buffers) -> list[Stage]:
    """The stages of a chunk, on the buffers; none overwrites what another reads."""
    spec, act = b.spec, b.spec.activation
    d, m, a = b.case.widths[0], b.case.widths[1], b.case.widths[-1]
    g, du, u = b.draw(b.n, m), torch.empty_like(b.g), torch.empty_like(b.u)
    into = torch.zeros_like(b.hidden)

    def backward_activation(backend: Backend) -> None:
        b.sums_m.zero_()
        backend.linear_backward_activation(b.z, b.w2, b.u, b.b1, act, du, b.sums_m)

    return [
        Stage(
            "activate",
            m,
            d,
            lambda backend: backend.linear_activate(b.h, b.w1, b.b1, act, u, b.g),
            lambda: [u, b.g],
        ),
        Stage(
            "losses",
            a,
            m,
            lambda backend: backend.linear_losses(
                g, b.w2, b.b2, LossChunk(b.dz, None, b.anchor, b.index, b.losses), spec
            ),
            lambda: [b.losses],
        ),
        Stage("backward_activation", m, a, backward_activation, lambda: [du, b.sums_m]),
        Stage(
            "backward_scatter",
            d,
            m,
            lambda backend: backend.linear_backward_scatter(
                b.u, b.w1, into, b.index, None, None, torch.empty_like(b.h)
            ),
            lambda: [into],
        ),
    ]


def triton_kinds(stage: Stage, b: Buffers) -> tuple[dict[str, Backend], str | None]:
    """The stage apart and in each configuration, by name; and the name of the heuristic's choice.

    Nothing but the stage apart where it cannot be fused.
    """
    from prereg_kernels.ops.backends.triton.fused.matmul_config import (
        EVERYTHING,
        FusionPlan,
        MatmulConfig,
        candidates,
        choose_config,
    )
    from prereg_kernels.ops.backends.triton.fused.stages import FusedTritonBackend

    def name(config: MatmulConfig) -> str:
        return f"{config.block_m}x{config.block_n}x{config.block_k}, {config.programs} a SM"

    capability = nvidia_capability(b.device)
    multiprocessors = torch.cuda.get_device_properties(b.device).multi_processor_count
    kinds: dict[str, Backend] = {APART: FusedTritonBackend(FusionPlan())}
    for config in candidates(stage.name, capability):
        kinds[name(config)] = FusedTritonBackend(EVERYTHING, config)
    chosen = choose_config(
        stage.name, b.n, stage.columns, b.h.itemsize, capability, multiprocessors
    )
    return kinds, None if chosen is None else name(chosen)


def time_stages(
    b: Buffers,
    kinds_of: Callable[[Stage, Buffers], tuple[dict[str, Backend], str | None]],
    clock: Clock,
    effort: Effort,
) -> Iterator[dict[str, Any]]:
    """A record for each stage: the medians of its kinds, interleaved, and the errors of others."""
    for stage in stages(b):
        kinds, chosen = kinds_of(stage, b)
        steps = {name: Measured(partial(stage.step, backend)) for name, backend in kinds.items()}
        errors = wrong_kinds(stage, kinds)
        sound = {name: step for name, step in steps.items() if name not in errors}
        times, later = warm_and_interleave(sound, clock, effort)
        medians = {name: statistics.median(samples) for name, samples in times.items()}
        apart = medians.pop(APART, None)
        record: dict[str, Any] = {"case": b.case.name, "name": stage.name, "chosen": chosen}
        record |= {"rows": b.n, "columns": stage.columns, "inner": stage.inner}
        record |= {"apart_ms": apart, "fused_ms": medians, "errors": errors | later}
        if apart is not None:
            record["speedups"] = {name: apart / median for name, median in medians.items()}
        yield record | {"samples_ms": times}


def wrong_kinds(stage: Stage, kinds: Mapping[str, Backend]) -> dict[str, str]:
    """The errors of the kinds that fail, or have other results than the stage apart."""
    errors: dict[str, str] = {}
    expected: list[Tensor] | None = None
    for name, rows in kinds.items():
        for output in stage.outputs():
            output.fill_(float("nan"))
        try:
            stage.step(rows)
            results = [output.clone() for output in stage.outputs()]
        except Exception as error:
            errors[name] = describe_error(error)
            continue
        if expected is None:
            expected = results
            continue
        found = max(map(relative_error, results, expected))
        if not found <= TOLERANCE:
            errors[name] = f"relative error {found:.1e}"
    return errors
