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


def step_errors(
    checkpoint: Path, run: Run, weight: float, *, number: int = 0, ranks: int = 1, **how: Any
) -> dict[str, float]:
    """The relative errors of a step's gradients, "model" and "heads", against the definition.

    They are those of what trains: the trainer has to train the decoder, or its adapter, whole.
    """
    steps = [run.step(number, rank) for rank in range(ranks)]
    for step in steps[1:]:
        assert all(torch.equal(x, steps[0]["gradients"][n]) for n, x in step["gradients"].items())
    step = {**steps[0], "batches": [batch for each in steps for batch in each["batches"]]}
    ours = step["gradients"]
    expected = gradients(checkpoint, run, step, weight, **how)
    left_out = expected.keys() - ours.keys()
    assert not [n for n in left_out if "vision_tower" not in n and "projector" not in n], left_out
    return errors(ours, {n: x for n, x in expected.items() if n in ours})


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
