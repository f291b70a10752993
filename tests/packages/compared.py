"""What is asked of each trainer's runs, whatever started them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.packages.definition import errors, gradients, split
from tests.packages.run import Run

FLOAT32 = 1e-5  # relative, against float64
FROZEN = ("vision_tower", "visual", "projector")  # what a trainer may leave as it is
FIGURES = {"loss", "lm_loss", "pre_loss", "pre_grad_norm"}


def with_equal_answers(data: Path, folder: Path) -> Path:
    """A copy of the chats whose answers have the same length, for trainers that take L_LM of a
    step to be the mean of its micro-batches' means.
    """
    folder.mkdir()
    path = folder / data.name
    lines = []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        row["messages"][1]["content"] = row["messages"][1]["content"][:3]
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    info = data.with_name("dataset_info.json")
    if info.exists():
        shutil.copy(info, folder)
    return path


def of_step(run: Run, number: int = 0, ranks: int = 1) -> dict[str, Any]:
    """A step of all ranks: its gradients, and the batches of each."""
    steps = [run.step(number, rank) for rank in range(ranks)]
    for step in steps[1:]:
        assert all(torch.equal(x, steps[0]["gradients"][n]) for n, x in step["gradients"].items())
    return {**steps[0], "batches": [batch for each in steps for batch in each["batches"]]}


def step_errors(
    checkpoint: Path, run: Run, weight: float, *, number: int = 0, ranks: int = 1, **how: Any
) -> dict[str, float]:
    """The relative errors of a step's gradients, "model" and "heads", against the definition.

    They are those of what trains: the trainer has to train the decoder, or its adapter, whole.
    """
    step = of_step(run, number, ranks)
    return errors(step["gradients"], expected_of(checkpoint, run, step, weight, **how))


def expected_of(
    checkpoint: Path, run: Run, step: Mapping[str, Any], weight: float, **how: Any
) -> dict[str, Tensor]:
    """The definition's gradients of what trains: the decoder, or its adapter, whole."""
    expected = gradients(checkpoint, run, step, weight, **how)
    left_out = expected.keys() - step["gradients"].keys()
    assert not [n for n in left_out if not any(part in n for part in FROZEN)], left_out
    return {n: x for n, x in expected.items() if n in step["gradients"]}


def head_error(checkpoint: Path, run: Run, weight: float, **how: Any) -> float:
    """That of the first step's heads alone, which no other loss reaches."""
    step = of_step(run)
    _, ours = split(step["gradients"])
    _, expected = split(gradients(checkpoint, run, step, weight, **how))
    assert ours.keys() == expected.keys()
    a, b = (torch.cat([x[n].double().flatten() for n in sorted(ours)]) for x in (ours, expected))
    return float((a - b).norm() / b.norm())


def difference(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative difference of two runs' gradients: "model", "heads"."""
    return errors(ours, expected)


def check_files(run: Run, checkpoints: Collection[str]) -> None:
    """Each checkpoint has the heads, whose file is no part of the model's."""
    for name in checkpoints:
        assert (run.output / name / "pre" / "pre_heads.safetensors").exists(), name


def check_logs(run: Run, checkpoint: str) -> list[dict[str, float]]:
    """Every entry has the figures, and L_LM is the loss's value."""
    entries = run.logs(checkpoint)
    assert entries
    for entry in entries:
        assert entry.keys() >= FIGURES, entry.keys()
        assert abs(entry["loss"] - entry["lm_loss"]) <= 1e-4 * abs(entry["loss"]), entry
        assert -1 <= entry["pre_loss"] <= 1
    return entries


def check_resumed(whole: Run, resumed: Run, start: Mapping[str, Tensor]) -> None:
    """The last weights are the same, bit for bit, and others than at the start."""
    assert whole.weights.keys() == resumed.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name]), name
    moved = {n for n, x in whole.weights.items() if not torch.equal(x, start[n])}
    model, heads = split({n: x for n, x in whole.weights.items() if n in moved})
    assert model and len(heads) == 4, moved


def check_low_precision(
    checkpoint: Path, two: Run, one: Run, weight: float, dtype: torch.dtype, **how: Any
) -> None:
    """Both runs' gradients are no further from the definition's than eager code is in this dtype,
    and so is each run's from the other's; L_PRe falls, and the heads move.
    """
    allowed: dict[str, float] = {}
    for run in (two, one):
        step = of_step(run)
        exact = expected_of(checkpoint, run, step, weight, **how)
        eager = expected_of(checkpoint, run, step, weight, autocast=dtype, **how)
        found, allowed = errors(step["gradients"], exact), errors(eager, exact)
        assert all(0 < found[n] <= allowed[n] + 1e-6 for n in found), (found, allowed)
        losses = [entry["pre_loss"] for entry in run.logs("checkpoint-4")]
        assert losses[-1] < losses[0] - 0.05, losses
        _, start = split(step["weights"])
        _, end = split(run.weights)
        assert all(not torch.equal(x, end[n]) for n, x in start.items())
    apart = difference(of_step(two)["gradients"], of_step(one)["gradients"])
    assert all(apart[n] <= allowed[n] for n in apart), (apart, allowed)
