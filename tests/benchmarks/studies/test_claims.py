# SPDX-License-Identifier: Apache-2.0
"""The study of harder tasks: what each condition changes, and a tiny run of what it repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.studies import claims
from benchmarks.studies.claims import (
    CONDITIONS,
    VARIANTS,
    FaintConfig,
    format_table,
    run_config,
    train_and_ask,
    variant_name,
)
from prereg_kernels.demo.data.questions import COMMON_FAMILIES
from prereg_kernels.demo.data.scenes import SceneConfig
from tests.demo.tiny import tiny_run

MORE_DIGITS = "2 to 4 digits in training, 5 to 7 in the test"


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_pair_differs_in_pre_alone(name: str) -> None:
    without, with_pre = (run_config(variant_name(name, pre), 3, 7) for pre in (False, True))
    assert [stage.pre for stage in without.stages] == [False, False]
    assert [stage.pre for stage in with_pre.stages] == [False, True]
    pre = with_pre.pre
    assert (pre.weight, pre.anchor) == (0.5, "pre_projector")
    assert 3 * pre.layer == 2 * with_pre.model.decoder_layers
    for field in ("seed", "scenes", "model", "families", "tower"):
        assert getattr(without, field) == getattr(with_pre, field)
    assert without.stages[-1].trainable == with_pre.stages[-1].trainable
    # Something is harder than in the demo
    demo = run_config(variant_name("12 layers", False), 3, 7)
    changed = (without.scenes, without.model, without.families, without.stages[-1].trainable)
    assert changed != (demo.scenes, demo.model, demo.families, demo.stages[-1].trainable) or (
        name == "12 layers" and demo.model.decoder_layers == 12
    )


def test_a_faint_tile_lets_the_ground_through() -> None:
    """A tile's pixels are at 0.3 of the way from the ground to the tile, all others as they are."""
    plain, faint = (
        config.open("train", 1).batch(range(6)) for config in (SceneConfig(), FaintConfig())
    )
    np.testing.assert_array_equal(plain.masks, faint.masks)
    ground = SceneConfig().open("train", 1)
    draws = claims.Draws(ground._key, np.arange(6))
    ground._draw_objects(draws)
    under = ground._draw_background(draws)
    covered = plain.masks >= 0
    np.testing.assert_array_equal(faint.images[~covered], plain.images[~covered])
    expected = 0.7 * under + 0.3 * plain.images
    np.testing.assert_allclose(faint.images[covered], expected[covered], atol=1e-6)


def test_what_is_asked_is_seen_in_the_test(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are of runs; the test's scenes are the condition's."""
    monkeypatch.setattr(claims, "run_config", lambda variant, seed, _: tiny_run(seed=seed))
    monkeypatch.setattr(claims, "TEST", 8)
    opened: list[SceneConfig] = []
    original = SceneConfig.open

    def watched(self: SceneConfig, split: str, seed: int = 0) -> Any:
        if split == "test":
            opened.append(self)
        return original(self, split, seed)

    monkeypatch.setattr(SceneConfig, "open", watched)
    names = [variant_name(MORE_DIGITS, pre) for pre in (False, True)]
    rows = [train_and_ask(name, seed, None, str(tmp_path)) for name in names for seed in (1, 2)]
    assert {config.min_digits for config in opened if config != tiny_run().scenes} == {5}
    assert all(row["accuracy"].keys() == set(COMMON_FAMILIES) for row in rows)
    table = format_table({"runs": rows})
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {MORE_DIGITS} | 2 |")]
    before = [100 * row["accuracy"]["count"] for row in rows[:2]]
    assert f"| {sum(before) / 2:.1f} |" in line
    assert "Not run: clutter and noise, faint digits" in table


def test_every_condition_has_its_two_variants() -> None:
    assert len(VARIANTS) == 2 * len(CONDITIONS) == 12
    assert set(VARIANTS.values()) == {(name, pre) for name in CONDITIONS for pre in (False, True)}
