# SPDX-License-Identifier: Apache-2.0
"""The study of adapters: what trains in each variant, what the table compares, and a tiny run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.studies import adapters
from benchmarks.studies.adapters import (
    COMPARED,
    VARIANTS,
    format_table,
    run_config,
    train_adapter,
    train_and_ask,
)
from prereg_kernels.demo.model.tower import new_model
from tests.benchmarks.studies.test_merging import merging_transfer
from tests.demo.tiny import tiny_run


def tiny(seed: int, steps: int | None = None) -> Any:
    run = tiny_run(seed=seed)
    last = replace(run.stages[-1], pre=False)
    return replace(run, stages=(*run.stages[:-1], last, replace(last, name="adapter")))


def test_the_adapter_goes_on_after_the_demo_s_run_without_pre() -> None:
    *before, adapter = run_config(3, 7).stages
    assert [stage.pre for stage in (*before, adapter)] == [False] * 3
    assert (before[-1].steps, adapter.steps, adapter.lr) == (7, 7, before[-1].lr)
    assert run_config(3).stages[-1].steps == 330


@pytest.mark.parametrize("name", [name for name, adapter in VARIANTS.items() if adapter])
def test_what_trains(name: str, tmp_path: Any) -> None:
    run, adapter = tiny(1), VARIANTS[name]
    assert adapter is not None
    model = new_model(run, str(tmp_path))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = dict(train_adapter(model, run, adapter).named_parameters())
    assert after.keys() == before.keys()  # neither adapter nor head is left
    changed = {n for n, p in after.items() if not torch.equal(p, before[n])}
    products = {n for n in after if "language_model" in n and n.endswith("_proj.weight")}
    projector = {n for n in after if "multi_modal_projector" in n}
    assert changed == products | (projector if adapter.projector else set())


def test_each_variant_of_pre_trains_otherwise(tmp_path: Any) -> None:
    run, ends = tiny(1), {}
    for name, adapter in VARIANTS.items():
        if adapter is not None:
            model = train_adapter(new_model(run, str(tmp_path)), run, adapter)
            ends[name] = model.model.language_model.layers[0].mlp.up_proj.weight.detach()
    for name, other in COMPARED.items():
        if other in ends:
            assert not torch.equal(ends[name], ends[other])


def test_a_tiny_study(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "run_config", tiny)
    monkeypatch.setattr(adapters, "TEST", 8)
    transfer = merging_transfer(monkeypatch)
    rows = [train_and_ask(name, seed, None, str(tmp_path)) for name in VARIANTS for seed in (1, 2)]
    assert all(row["transfer"].keys() == set(transfer.frozen) for row in rows)
    table = format_table({"runs": rows})
    [line] = [line for line in table.splitlines() if line.startswith("| adapter, PRe | adapter |")]

    def own(name: str) -> float:
        means = [sum(r["accuracy"].values()) / 4 for r in rows if r["variant"] == name]
        return 100 * sum(means) / len(means)

    level, difference = (cell.strip() for cell in line.strip("|").split("|")[-2:])
    assert level == f"{own('adapter, PRe'):.1f}"
    gain = own("adapter, PRe") - own("adapter")
    assert difference.startswith(f"{gain:+.1f} ± ") and "2 paired seeds" in table
