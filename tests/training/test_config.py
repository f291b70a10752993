"""Settings: YAML and back, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prereg_kernels.training.config import (
    PRESettings,
    RunConfig,
    StageConfig,
    from_dict,
    load_config,
    save_config,
    to_dict,
)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        seed=3,
        stages=(StageConfig("half", steps=7, trainable=("llm",), frozen_layers=3, pre=True),),
        pre=PRESettings(weight=0.5, anchor="other_scene", token_fraction=0.5),
        families={"tilt": 1.0, "count": 0.25},
        init_from="elsewhere",
        precision="bf16",
    )
    save_config(config, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml", RunConfig) == config
    assert from_dict(RunConfig, to_dict(config)) == config


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert load_config(tmp_path / "run.yaml", RunConfig) == RunConfig()


def test_integers_do_for_numbers() -> None:
    assert from_dict(RunConfig, {"pre": {"weight": 2}}).pre.weight == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"^sed: unknown key; expected one of \['accumulation'"),
        ({"pre": {"wieght": 1}}, r"^pre\.wieght: unknown key"),
        ({"seed": "one"}, r"^seed: expected an integer, got 'one'"),
        ({"seed": True}, r"^seed: expected an integer, got True"),
        ({"seed": 1.5}, r"^seed: expected an integer, got 1.5"),
        ({"seed": None}, r"^seed: expected an integer, got None"),
        (
            {"stages": [{"name": "a", "steps": 1, "lr": "fast"}]},
            r"\]\.lr: .*number.*fast",
        ),
        ({"stages": [{"name": "a"}]}, r"^stages\[0\]\.steps: required, but missing"),
        ({"stages": {"name": "a"}}, r"^stages: expected a list, got"),
        ({"stages": []}, r"^stages: expected at least one stage"),
        (
            {"stages": [{"name": "a", "steps": 0}]},
            r"steps: expected at least 1, got 0",
        ),
        (
            {"stages": [{"name": "a", "steps": 1, "trainable": ["head"]}]},
            r"trainable: expected",
        ),
        ({"stages": [{"name": "a", "steps": 1, "frozen_layers": 7}]}, r"^frozen_layers: .*got 7"),
        ({"stages": [{"name": "a", "steps": 1, "pre": 1}]}, r"pre: expected true or false, got 1"),
        (
            {"stages": [{"name": "a", "steps": 1, "data": "sound"}]},
            r"data: expected one of .*got 'sound'",
        ),
        (
            {"stages": [{"name": "a", "steps": 1, "data": "text"}]},
            r"trainable: expected \[llm\] where data is text",
        ),
        (
            {"stages": [{"name": "a", "steps": 1, "data": "text", "pre": True}]},
            r"pre: expected false where data is text",
        ),
        ({"pre": 2.0}, r"^pre: expected a mapping, got 2.0"),
        ({"pre": {"anchor": "self"}}, r"^pre\.anchor: expected one of .*got 'self'"),
        ({"families": {"weather": 1}}, r"^families: unknown \['weather'\]"),
        ({"families": ["count"]}, r"^families: expected a mapping"),
        ({"precision": "fp16"}, r"^precision: expected one of .*got 'fp16'"),
        ({"micro_batch": 0}, r"^micro_batch: expected at least 1, got 0"),
        ({"scenes": {"grid": 0}}, r"^scenes\.grid: expected at least 1, got 0"),
        ({"model": {"width": 50}}, r"^model\.width: expected a multiple of"),
        ({"beta2": 1.0}, r"^beta2: expected in \[0, 1\), got 1.0"),
        ("seed", r"^config: expected a mapping"),
    ],
)
def test_errors_name_key_value_and_expectation(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, values)


def test_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("seed: [1")
    with pytest.raises(ValueError, match=r"bad\.yaml: not valid YAML"):
        load_config(path, RunConfig)
    path.write_text("seed: x")
    with pytest.raises(ValueError, match=r"bad\.yaml: seed: expected an integer"):
        load_config(path, RunConfig)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(path, RunConfig)


def test_pre_must_fit_the_decoder() -> None:
    with pytest.raises(ValueError, match="layer: expected at most 6"):
        RunConfig(stages=(StageConfig("a", steps=1, pre=True),), pre=PRESettings(layer=7))
