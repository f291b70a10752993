# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to a file of a checkpoint, what was saved comes back, or one line."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prereg_kernels.attach.regularizer import apply_pre
from prereg_kernels.attach.storage import PRE_DIR
from prereg_kernels.demo.checkpoints.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    restore_optimizer,
)
from prereg_kernels.demo.loop import TrainingInterrupted, load_model, train
from tests.demo.tiny import as_version_0_1_0, signal_in_step, tiny_run
from tests.fuzzing import damaged, fuzz


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        signal_in_step(patch, 4)
        train(tiny_run(), run, progress=False, tensorboard=False)
    return run


@pytest.fixture(scope="module")
def saved(run: Path) -> dict[str, Any]:
    return loaded(run)


def loaded(run: Path) -> dict[str, Any]:
    """All that a run would go on from."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    model = load_model(checkpoint.path)
    plain = dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *apply_pre(model, layers=[1]).heads[1].parameters()],
        betas=(0.9, 0.98), weight_decay=0.05, fused=True,
    )  # fmt: skip
    frozen = set(model.model.vision_tower.parameters())
    parameters = [p for p in optimizer.param_groups[0]["params"] if p not in frozen]
    optimizer.param_groups[0]["params"] = parameters
    model._prereg.load(checkpoint.path / PRE_DIR)
    restore_optimizer(checkpoint, optimizer)
    return {
        "about": (checkpoint.step, checkpoint.stage, checkpoint.config, model._prereg.passes),
        "model": plain,
        "heads": dict(model.pre_heads.state_dict()),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(x, other[name]) for name, x in one.items())
    return bool(one == other)


def damage(data: st.DataObject, run: Path, copy: Path) -> None:
    """A copy of the run, one file of whose checkpoint is damaged."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    files = sorted(path for path in copy.glob("checkpoints/*/**/*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    file.write_bytes(damaged(data.draw, file.read_bytes()))


@fuzz(40)
@given(data=st.data())
def test_damage_is_noticed(
    run: Path,
    saved: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    copy = tmp_path_factory.getbasetemp() / "damaged run"
    damage(data, run, copy)
    try:
        found = loaded(copy)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(copy) in str(error)
    else:
        assert same(found, saved)


@fuzz(8)
@given(data=st.data())
def test_damage_without_a_manifest_does_not_crash(
    run: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Nothing could tell a flipped bit there, so numbers may be others."""
    copy = tmp_path_factory.getbasetemp() / "damaged old run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    as_version_0_1_0(copy)
    damage(data, copy, copy.with_name("damaged old copy"))
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()

    def child() -> None:
        try:
            config = tiny_run()
            train(config, copy.with_name("damaged old copy"), progress=False, tensorboard=False)
        except (CheckpointError, ValueError) as error:
            said.put(str(error))

    process = context.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert said.empty() or "\n" not in said.get()
