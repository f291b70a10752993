# SPDX-License-Identifier: Apache-2.0
"""A whole training step with and without PRe, on a GPU: each variant beside the step without.

The gradients of the variants are compared with float64's before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.common.machine import machine
from benchmarks.common.program import Session
from benchmarks.common.replay import REPLAY
from benchmarks.common.report import Json
from benchmarks.common.timing import Effort, make_clock
from benchmarks.loss.plans import TINY as TINY_EFFORT
from benchmarks.step.measure import Trainer, run_setting, setting_name
from benchmarks.step.models import FULL, TINY, build_model, make_batch, set_checkpointing
from benchmarks.step.variants import VARIANTS, Regularizer, check_gradients

EFFORT = Effort(8, 40, 120.0)
pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(timer=REPLAY.clock)]
Measure = Callable[[str, bool], Json]


@pytest.fixture(scope="module")
def measured(device: torch.device, is_tiny: bool) -> Measure:
    """The record of a model's step, measured when the first of its variants runs."""
    session = Session(make_clock(device), math.inf)

    @cache
    def trainer(name: str) -> Trainer:
        recipe = (TINY if is_tiny else FULL)[name]
        model = build_model(recipe.config(), device)
        return Trainer(session, recipe, model, Regularizer.of(model))

    @cache
    def measure(name: str, checkpointing: bool) -> Json:
        recipe = TINY[name]
        model = build_model(recipe.config(), device)
        set_checkpointing(model, checkpointing)
        batch = make_batch(recipe, recipe.config(), recipe.batch, device)
        record: Json = {"check": check_gradients(model, batch)}
        run_setting(trainer(name), checkpointing, TINY_EFFORT if is_tiny else EFFORT, record)
        return record

    return measure


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("checkpointing", (False, True), ids=setting_name)
@pytest.mark.parametrize("model", FULL)
def test_step(
    benchmark: Any,
    measured: Measure,
    device: torch.device,
    model: str,
    checkpointing: bool,
    variant: str,
) -> None:
    record = measured(model, checkpointing)
    found = record["variants"][variant]
    assert found["status"] == "ok", f"{variant}: {found.get('reason')}"
    benchmark.group = f"step, {model}, {setting_name(checkpointing)}, {record['batch']} samples"
    keys = ("peak_bytes", "added_percent", "added_percent_quartiles", "beyond_bytes")
    benchmark.extra_info |= machine(device) | {"flops": record["flops"]}
    benchmark.extra_info |= {key: found[key] for key in keys if key in found}
    REPLAY.milliseconds(benchmark, found["samples_ms"])
