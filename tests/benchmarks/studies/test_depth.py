# SPDX-License-Identifier: Apache-2.0
"""The study of where what no question asks is lost: a tiny run of what it repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies import depth
from benchmarks.studies.depth import (
    BASELINE,
    MEASURES,
    VARIANTS,
    format_table,
    objects,
    place_names,
    plot,
    run_config,
    share_of_variance,
    train_and_measure,
    values,
)
from prereg_kernels.demo.data.packing import build_tokenizer, pixel_values
from prereg_kernels.demo.data.scenes import Scenes
from prereg_kernels.demo.model.llava import build_model, tower_features
from tests.demo.tiny import tiny_run


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "run_config", lambda variant, seed, _: tiny_run(seed=seed))
        for name, count in (("MANY", 12), ("FEW", 6), ("TEST", 12)):
            patch.setattr(depth, name, count)
        cache = str(tmp_path_factory.mktemp("cache"))
        rows = [train_and_measure(v, s, None, cache) for v in (BASELINE, "PRe") for s in (1, 2)]
    return {"runs": rows}


def test_every_place_is_measured(stored: dict[str, Any], tmp_path: Path) -> None:
    rows = stored["runs"]
    assert place_names(rows) == ["tower", "projector", "layer 1", "layer 2"]
    for row in rows:
        for measure in MEASURES:
            assert {len(numbers) for numbers in row[measure].values()} == {4}
            assert all(0 <= x <= 1 for numbers in row[measure].values() for x in numbers)
    # Nothing trains the tower
    tower = [values(rows, name, "many", 0, [1, 2]) for name in (BASELINE, "PRe")]
    assert tower[0] == tower[1]
    assert values(rows, BASELINE, "many", 1, [1]) != values(rows, BASELINE, "few", 1, [1])
    text = format_table(stored)
    assert text.count("| baseline |") == len(MEASURES) and "paired seeds, 1 to 2." in text
    # A sweep that is stopped lacks some: pairs are of the seeds that both have
    assert "| PRe | 1 |" in format_table({"runs": rows[:-1]})
    plot(stored, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"depth-{m}.png" for m in MEASURES}


def test_a_digit_is_the_mean_of_its_patches() -> None:
    run = tiny_run()
    model = build_model(run.model, run.scenes, build_tokenizer(run.scenes), 0).eval()
    scenes = Scenes("test", 3, run.scenes)
    (tower, entering, *_), labels, scene = objects(model, scenes, 5)
    facts = scenes.batch(range(5))
    patches, digits = facts.patch_objects, facts.fields["digit"]
    with torch.no_grad():
        features = tower_features(model, pixel_values(facts.images)).view(5, -1, tower.shape[1])
    row = 0
    for number in range(5):
        for digit in range(digits.shape[1]):
            mine = torch.from_numpy(patches[number] == digit)
            if mine.any():
                torch.testing.assert_close(tower[row], features[number][mine].mean(0))
                assert scene[row] == number and labels["digit"][row] == digits[number, digit]
                row += 1
    assert len(tower) == len(entering) == row > 5


def test_the_share_of_variance_is_a_regression_s() -> None:
    """R squared of the least squares fit to the classes."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40,), generator=draws)
    x = torch.randn(40, 5, generator=draws) + 2.0 * labels[:, None]
    classes = torch.nn.functional.one_hot(labels).float()
    rest = x - classes @ torch.linalg.lstsq(classes, x).solution
    expected = 1 - float(rest.square().sum() / (x - x.mean(0)).square().sum())
    assert share_of_variance(x, labels) == pytest.approx(expected, rel=1e-5)


def test_variants_differ_in_what_they_say_alone() -> None:
    runs = {name: run_config(name, 2, 7) for name in VARIANTS}
    assert not any(stage.pre for stage in runs[BASELINE].stages)
    pre = runs["PRe"].pre
    assert (pre.weight, pre.layer, pre.anchor) == (0.5, 4, "pre_projector")
    assert runs["PRe, weight 5"].pre.weight == 5.0
    assert runs["PRe, pre_llm"].pre.anchor == "pre_llm"
    assert all(run.seed == 2 and run.stages[-1].steps == 7 for run in runs.values())
