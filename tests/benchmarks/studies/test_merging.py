# SPDX-License-Identifier: Apache-2.0
"""The study of a projector that merges: what it joins, what PRe reads of it, and a tiny run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.studies import merging
from benchmarks.studies.merging import (
    FAMILY,
    VARIANTS,
    Blocks,
    MergedScenes,
    format_table,
    merging_model,
    run_config,
    train_and_ask,
)
from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.demo.data.packing import Packer, build_tokenizer
from tests.demo.tiny import tiny_run


def tiny(variant: str, seed: int, steps: int | None) -> Any:
    run = tiny_run(seed=seed)
    wanted = run_config(variant, seed)
    scenes = MergedScenes(**vars(run.scenes) | {"patch_size": run.scenes.patch_size // 2})
    last = replace(run.stages[-1], pre=wanted.stages[-1].pre)
    layer = min(wanted.pre.layer, run.model.decoder_layers)
    return replace(
        run, scenes=scenes, stages=(*run.stages[:-1], last),
        pre=replace(wanted.pre, layer=layer),
    )  # fmt: skip


def test_variants_differ_in_pre_alone() -> None:
    runs = {name: run_config(name, 3, 7) for name in VARIANTS}
    assert {name: run.stages[-1].pre for name, run in runs.items()} == {
        "baseline": False, "pre_projector": True, "pre_llm": True
    }  # fmt: skip
    for name in ("pre_projector", "pre_llm"):
        assert (runs[name].pre.anchor, runs[name].pre.weight, runs[name].pre.layer) == (
            name, 0.5, 4
        )  # fmt: skip
    for field in ("seed", "scenes", "model", "families", "tower"):
        assert len({repr(getattr(run, field)) for run in runs.values()}) == 1
    assert MergedScenes().patches == 36 and MergedScenes().patch_size == 4


def test_blocks() -> None:
    """Of 4 x 4 patches, the first token is of the four in the corner."""
    grid = torch.arange(16.0).reshape(1, 16, 1)
    tokens = Blocks()(grid).reshape(4, 4).int().tolist()
    assert tokens == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_the_anchor_is_what_the_tower_says_of_the_four(tmp_path: Any) -> None:
    run = tiny("pre_projector", 1, None)
    model = merging_model(run, str(tmp_path)).eval()
    scenes = run.scenes.open("test", 1).batch(range(2))
    batch = Packer(build_tokenizer(run.scenes), run.scenes.patches).pack(scenes.images, [[], []])
    seen: list[torch.Tensor] = []

    def of_the_model(inputs: Any) -> torch.Tensor:
        tower = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[:, 1:]
        side = round(tower.shape[1] ** 0.5)
        grid = tower.unflatten(1, (side, side))
        corners = [grid[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        seen.append(torch.cat(corners, dim=-1).flatten(0, 2))
        return seen[-1]

    values = []
    for anchor, settings in (
        ("pre_projector", {}), (of_the_model, {"anchor_features": 4 * run.model.width})
    ):  # fmt: skip
        pre = apply_pre(
            model, family=FAMILY, anchor=anchor, layers=1, value_in_eval=True, **settings
        )
        with torch.no_grad():
            model(**batch)
        values.append(pre.metrics()["pre_loss"])
        remove_pre(model)
    assert seen[0].shape == (2 * run.scenes.patches, 4 * run.model.width)
    assert values[0] == pytest.approx(values[1], rel=1e-6) and values[0] != 0


def test_a_tiny_study(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "run_config", tiny)
    monkeypatch.setattr(merging, "TEST", 8)
    transfer = merging_transfer(monkeypatch)
    rows = [train_and_ask(name, seed, None, str(tmp_path)) for name in VARIANTS for seed in (1, 2)]
    assert all(row["transfer"].keys() == set(transfer.frozen) for row in rows)
    assert all(row["transfer"]["projector"].keys() == set(transfer.families) for row in rows)
    table = format_table({"runs": rows})
    assert (
        table.startswith("| | baseline | pre_projector | pre_llm |") and "2 paired seeds" in table
    )
    level = 100 * sum(sum(r["accuracy"].values()) / 4 for r in rows[:2]) / 2
    assert f"| the training's own questions | {level:.1f} |" in table


def merging_transfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The test of new questions, with two steps."""
    from prereg_kernels.cli import demo

    sweep = demo.load_sweep("scenes")
    transfer = replace(sweep.experiment.transfer, steps=2, warmup=1, scenes=4)
    small = replace(sweep, experiment=replace(sweep.experiment, transfer=transfer))
    monkeypatch.setattr(demo, "load_sweep", lambda name: small)
    return transfer
