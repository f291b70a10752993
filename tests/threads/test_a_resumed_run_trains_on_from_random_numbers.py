# SPDX-License-Identifier: Apache-2.0
"""I resumed from a checkpoint that a copy had cut short, and the loss jumped to where it began.

A tensor, the heads or a moment of the optimizer that was missing was made anew, without a word; an
optimizer's state of other shapes ended the process by a segmentation fault. All of a checkpoint is
checked before anything trains on: what the run needs is there, in its shapes and dtypes, or one
line says what is not.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prereg_kernels.demo.checkpoints.checkpoint import CheckpointError
from prereg_kernels.demo.loop import TrainingInterrupted, train
from prereg_kernels.demo.metrics import read_metrics
from tests.demo.tiny import as_version_0_1_0, signal_in_step, tiny_run

NAME = "checkpoints/step-00000005"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped in the middle of the stage with PRe, its tower beside it."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted):
        signal_in_step(patch, 5)
        train(tiny_run(), run, progress=False, tensorboard=False)
    return run


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        change(tensors)
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})

    return apply


def training(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "training_state.pt", weights_only=True)
        change(state)
        torch.save(state, checkpoint / "training_state.pt")

    return apply


def config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        values = json.loads((checkpoint / "config.json").read_text())
        change(values)
        (checkpoint / "config.json").write_text(json.dumps(values))

    return apply


def moments(state: dict[str, Any]) -> dict[str, Any]:
    return state["optimizer"]["state"][3]


LAYER = "language_model.model.layers.1.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor": (weights(lambda w: w.pop(LAYER)), "1 missing tensors: .*up_proj"),
    "another tensor": (weights(lambda w: w.update(x=torch.ones(1))), "1 unexpected tensors: x"),
    "a shape": (weights(lambda w: w.update({LAYER: w[LAYER][:3].clone()})), "1 mismatched tensors"),
    "rounded": (weights(lambda w: w.update({LAYER: w[LAYER].half()})), "up_proj.weight is F16"),
    "integers": (weights(lambda w: w.update({LAYER: w[LAYER].int()})), "up_proj.weight is I32"),
    "the weights": (lambda path: (path / "model.safetensors").unlink(), "could not load a model"),
    "the heads": (lambda path: shutil.rmtree(path / "pre"), "could not load the heads of .*expec"),
    "attention": (
        config(lambda c: c["vision_config"].update(num_attention_heads=1)),
        "vision_config.num_attention_heads is 1, expected 2",
    ),
    "a moment": (training(lambda s: moments(s).pop("exp_avg")), "parameter 3: expected step, exp"),
    "a parameter": (training(lambda s: s["optimizer"]["state"].pop(3)), r"no state of .*\{3\}"),
    "moments' shape": (training(lambda s: moments(s).update(exp_avg=torch.zeros(1))),
                       r"parameter 3: exp_avg is torch.Size\(\[1\]\)"),
    "moments' dtype": (training(lambda s: moments(s).update(
        exp_avg_sq=moments(s)["exp_avg_sq"].half())), "parameter 3: exp_avg_sq is .*float16"),
    "a count": (training(lambda s: moments(s).update(step=torch.tensor(1.0))), "step is 1.0, expe"),
    "a setting": (training(lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.5, 0.5))),
                  r"betas is \(0.5, 0.5\), expected \(0.9, 0.98\)"),
    "a group": (training(lambda s: s["optimizer"]["param_groups"][0]["params"].pop()),
                "expected an optimizer of"),
    "a generator": (training(lambda s: s["rng"].update(torch=torch.zeros(7).byte())), "RNG state"),
    "NumPy's place": (training(lambda s: s["rng"]["numpy"].__setitem__(2, 10**6)), "of NumPy's g"),
    "no generator": (training(lambda s: s["rng"].pop("python")), "KeyError.*python"),
}  # fmt: skip


def error_of_training(run: Path) -> str:
    """What training on raises, in a process that may crash."""
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()

    def child() -> None:
        try:
            train(tiny_run(), run, progress=False, tensorboard=False)
        except CheckpointError as error:
            said.put(str(error))
        else:
            said.put("it trains on")

    process = context.Process(target=child)
    process.start()
    process.join()
    return f"exit code {process.exitcode}" if said.empty() else said.get()


@pytest.mark.parametrize("what", DAMAGE)
def test_a_part_that_does_not_fit(stopped: Path, tmp_path: Path, what: str) -> None:
    """Where no list of files could tell: as version 0.1.0 wrote checkpoints."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    as_version_0_1_0(run)
    change, message = DAMAGE[what]
    change(run / NAME)
    said = error_of_training(run)
    assert re.search(message, said) and "\n" not in said
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5]


def test_the_one_before_goes_on_where_it_is_there(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run ends where an unbroken one does."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    kept = tmp_path / "kept"
    shutil.copytree(run / NAME, kept)
    signal_in_step(monkeypatch, 1)
    with pytest.raises(TrainingInterrupted):
        train(tiny_run(), run, progress=False, tensorboard=False)
    monkeypatch.undo()
    newest = run / "checkpoints" / "step-00000006"
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    shutil.copytree(kept, run / NAME)
    with pytest.warns(
        UserWarning, match=r"step-00000006 is damaged: model\.safetensors holds othe"
    ):
        result = train(tiny_run(), run, progress=False, tensorboard=False)
    again = train(tiny_run(), stopped.with_name("unbroken"), progress=False, tensorboard=False)
    for name, x in again.model.state_dict().items():
        assert torch.equal(x, result.model.state_dict()[name]), name
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 9))
    assert sorted(path.name for path in newest.parent.iterdir()) == [
        "step-00000006.damaged", "step-00000008",
    ]  # fmt: skip


def test_a_run_of_version_0_1_0_goes_on(stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    as_version_0_1_0(run)
    shutil.copytree(run / NAME, run / f"{NAME}-keep")
    train(tiny_run(), run, progress=False, tensorboard=False)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 9))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000005-keep", "step-00000008"]
