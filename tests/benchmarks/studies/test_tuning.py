# SPDX-License-Identifier: Apache-2.0
"""The study of full tuning and of LoRA on the projector: what trains, and a tiny run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.studies import adapters, tuning
from benchmarks.studies.tuning import COMPARED, VARIANTS, format_table, train_and_ask, tune
from prereg_kernels.demo.model.tower import new_model
from tests.benchmarks.studies.test_adapters import tiny
from tests.benchmarks.studies.test_merging import merging_transfer

TUNED = {name: tuning for name, tuning in VARIANTS.items() if tuning is not None}


@pytest.mark.parametrize("name", TUNED)
def test_what_trains(name: str, tmp_path: Any) -> None:
    """With full tuning all of the LLM and nothing before it; else each matrix of both."""
    run = tiny(1)
    model = new_model(run, str(tmp_path))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = dict(tune(model, run, TUNED[name]).named_parameters())
    assert after.keys() == before.keys()  # neither adapter nor head is left
    changed = {n for n, p in after.items() if not torch.equal(p, before[n])}
    llm = {n for n in after if "language_model" in n or "lm_head" in n}
    if not TUNED[name].adapts:
        assert changed == llm
        return
    products = {n for n in llm if n.endswith("_proj.weight")}
    projector = {n for n in after if "multi_modal_projector" in n and n.endswith(".weight")}
    assert changed == products | projector and len(projector) == 2


def test_pre_trains_otherwise(tmp_path: Any) -> None:
    run, ends = tiny(1), {}
    for name, chosen in TUNED.items():
        model = tune(new_model(run, str(tmp_path)), run, chosen)
        ends[name] = model.model.language_model.layers[0].mlp.up_proj.weight.detach()
    for name, other in COMPARED.items():
        assert other not in ends or not torch.equal(ends[name], ends[other])


def test_a_tiny_study(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "run_config", tiny)
    monkeypatch.setattr(adapters, "TEST", 8)
    merging_transfer(monkeypatch)
    rows = [
        train_and_ask(name, seed, None, str(tmp_path), tuning.VARIANTS, tune)
        for name in VARIANTS
        for seed in (1, 2)
    ]
    lines = format_table({"runs": rows}).splitlines()
    names = [line.strip("|").split("|")[0].strip() for line in lines[2 : 2 + len(VARIANTS)]]
    assert names == list(VARIANTS)
    [line] = [line for line in lines if line.startswith("| decoder, PRe | decoder |")]

    def own(name: str) -> float:
        means = [sum(r["accuracy"].values()) / 4 for r in rows if r["variant"] == name]
        return 100 * sum(means) / len(means)

    level, difference = (cell.strip() for cell in line.strip("|").split("|")[-2:])
    assert level == f"{own('decoder, PRe'):.1f}"
    assert difference.startswith(f"{own('decoder, PRe') - own('decoder'):+.1f} ± ")
