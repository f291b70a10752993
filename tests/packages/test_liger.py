# SPDX-License-Identifier: Apache-2.0
"""PRe beside Liger's patched forward, in its release 0.8.5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.packages.liger_run import NAMES
from tests.packages.run import QUIET, ROOT, folder_of
from tests.train.places import make_place, metrics, settings, write

pytestmark = pytest.mark.packages


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("liger") / "steps.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.packages.liger_run", str(path)], text=True, timeout=300,
        env={**os.environ, **QUIET, "PYTHONPATH": f"{folder_of('liger')}:{ROOT}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    found: dict[str, list[dict[str, Any]]] = torch.load(path)
    return found


@pytest.mark.parametrize("items", ("", ", by items"))
@pytest.mark.parametrize("when", (1, 2), ids=("patched after", "patched before"))
@pytest.mark.parametrize("name", NAMES)
def test_gradients(
    steps: dict[str, list[dict[str, Any]]], name: str, when: int, items: str
) -> None:
    """With PRe attached first, or to a model that Liger has patched."""
    own, ours = steps[name + items][0], steps[name + items][when]
    assert own["has_logits"] and not ours["has_logits"]  # as nobody computes them
    expected = own["gradients"]
    assert expected.keys() == ours["gradients"].keys()
    assert sum("pre_heads" in parameter for parameter in expected) == 8
    for parameter, x in expected.items():
        torch.testing.assert_close(
            ours["gradients"][parameter], x, rtol=1e-4, atol=1e-6, msg=parameter
        )
    assert ours["figures"] == pytest.approx(own["figures"], rel=1e-5)
    assert own["figures"]["visual_tokens"] > 0


def test_a_run_of_prereg_train(tmp_path: Path) -> None:
    """`--trainer.use_liger_kernel true`: the figures of each step are those without it."""
    place = make_place(tmp_path / "place")
    figures = []
    for is_liger in (False, True):
        out = tmp_path / f"{is_liger}"
        changes = {"stages__1__num_train_epochs": 1, "trainer__use_liger_kernel": is_liger}
        path = write(tmp_path / "c.yaml", settings(place, out, **changes))
        done = subprocess.run(
            [sys.executable, "-m", "tests.packages.liger_train", str(path)], text=True, timeout=300,
            env={**os.environ, **QUIET, "PYTHONPATH": f"{folder_of('liger')}:{ROOT}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:]
        assert done.stdout.splitlines()[-1] == f"Liger's losses: {9 if is_liger else 0}"
        figures.append([line for stage in ("align", "tune") for line in metrics(out, stage)])
    for own, ours in zip(*figures, strict=True):
        for name in ("lm_loss", "grad_norm", *(["pre_loss"] if "pre_loss" in own else [])):
            assert ours[name] == pytest.approx(own[name], rel=1e-4, abs=1e-6), name
