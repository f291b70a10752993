# SPDX-License-Identifier: Apache-2.0
"""What is asked of each trainer's runs, whatever started them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.packages.definition import errors, gradients, make_model, split
from tests.packages.run import Run

FLOAT32 = 1e-5  # relative, against float64
FROZEN = ("vision_tower", "visual", "projector")  # what a trainer may leave as it is
COPY = ".modules_to_save.default."  # PEFT's, of a module that trains whole beside an adapter
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


def merged_by_hand(checkpoint: Path, run: Run) -> dict[str, Tensor]:
    """The state in float64 of the run's last adapter in the model."""
    model: Any = make_model(checkpoint, run)
    own, _ = split(run.weights)
    model.load_state_dict({n: x.double() for n, x in own.items()}, strict=False)
    merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return merged


def check_files(run: Run, checkpoints: Collection[str]) -> None:
    """Each checkpoint has the heads, whose file is no part of the model's."""
    for name in checkpoints:
        assert (run.output / name / "pre" / "pre_heads.safetensors").exists(), name


def check_warning(frozen: Run, trained: Run) -> None:
    """PRe says where the projector does not train beside LoRA, once, and only there."""
    said = "is frozen beside the LoRA adapter"
    assert (frozen.text.count(said), trained.text.count(said)) == (1, 0)


def check_projector(run: Run, adapter: Path) -> None:
    """Beside LoRA a copy of the projector trains, all of it, and the adapter's file has it."""
    step, end = run.step(0), run.weights
    copies = [name for name in end if COPY in name]
    original = [name for name in end if ".original_module." in name]
    assert copies and len(copies) == len(original)
    assert any("lora_" in name for name in step["gradients"])
    written = load_file(adapter / "adapter_model.safetensors")
    for name in copies:
        assert step["gradients"][name].abs().max() > 0, name
        assert not torch.equal(end[name], step["weights"][name]), name
        assert torch.equal(written[name.replace(COPY, ".")], end[name]), name
    assert all(torch.equal(end[name], step["weights"][name]) for name in original)


def check_copied(run: Run, modules: Collection[str]) -> None:
    """Each of these modules trains beside LoRA."""
    copied = {name.partition(COPY)[0] for name in run.weights if COPY in name}
    assert all(any(name.endswith(module) for name in copied) for module in modules), copied


def check_whole(run: Run) -> None:
    """Without an adapter, all of the projector trains."""
    start = run.step(0)["weights"]
    projector = [name for name in start if "projector" in name and "pre_heads." not in name]
    assert len(projector) == 4
    assert all(not torch.equal(run.weights[name], start[name]) for name in projector)


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
    checkpoint: Path,
    two: Run,
    one: Run,
    weight: float,
    dtype: torch.dtype,
    last: str = "checkpoint-4",
    **how: Any,
) -> None:
    """However a step is spread over micro-batches, the heads' gradients are no further from the
    one definition than eager code is in this dtype. L_PRe falls, and the heads move.

    The model's gradients are the trainer's arithmetic as well, such as what it casts and where.
    """
    exact = expected_of(checkpoint, two, of_step(two), weight, **how)
    for run in (two, one):
        step = of_step(run)
        eager = expected_of(checkpoint, run, step, weight, autocast=dtype, **how)
        found, allowed = errors(step["gradients"], exact), errors(eager, exact)
        assert 0 < found["heads"] <= allowed["heads"] + 1e-6, (found, allowed)
        assert 0 < found["model"] <= 1.1 * allowed["model"], (found, allowed)
        losses = [entry["pre_loss"] for entry in run.logs(last)]
        assert losses[-1] < losses[0] - 0.05, losses
        _, start = split(step["weights"])
        _, end = split(run.weights)
        assert all(not torch.equal(x, end[n]) for n, x in start.items())
