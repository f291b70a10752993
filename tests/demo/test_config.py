# SPDX-License-Identifier: Apache-2.0
"""Settings: YAML and back, and errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prereg_kernels._util.settings_file import from_dict, load_config, parse, to_dict
from prereg_kernels.demo.config import PReSettings, RunConfig, StageConfig, TowerConfig, save_config
from prereg_kernels.demo.experiment.experiment import ExperimentConfig
from prereg_kernels.demo.experiment.transfer import TransferConfig
from prereg_kernels.demo.model.llava import ModelConfig


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        seed=3,
        stages=(StageConfig("half", steps=7, trainable=("llm",), frozen_layers=3, pre=True),),
        pre=PReSettings(weight=0.5, anchor="other_scene", token_fraction=0.5),
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


NUMBERS = [
    ("lr", "stages: [{{name: a, steps: 1, lr: {}}}]"),
    ("weight", "pre: {{weight: {}}}"),
    ("noise", "scenes: {{noise: {}}}"),
    ("initializer_range", "model: {{initializer_range: {}}}"),
    ("lr", "tower: {{lr: {}}}"),
    ("families", "families: {{count: {}}}"),
    ("weight_decay", "weight_decay: {}"),
]


@pytest.mark.parametrize(("name", "text"), NUMBERS)
@pytest.mark.parametrize(
    "value", (".inf", "-.inf", ".nan", "-1.0", "true", "'1e-3'", "'0.1'", "1" + "0" * 400, "[1]")
)
def test_numbers_are_finite_and_no_text(tmp_path: Path, name: str, text: str, value: str) -> None:
    (tmp_path / "run.yaml").write_text(text.format(value))
    with pytest.raises(ValueError, match=rf"run\.yaml: .*{name}.*: expected ") as caught:
        load_config(tmp_path / "run.yaml", RunConfig)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ("1e-3", "1E-3", "+1e-3", "1.e-3", "1.0e-3", "10e-4", "0.001", "0.01e-1")
)
def test_numbers_as_yaml_1_2_writes_them(tmp_path: Path, text: str) -> None:
    """PyYAML takes those without a point for text."""
    (tmp_path / "run.yaml").write_text(f"pre: {{weight: {text}}}")
    assert load_config(tmp_path / "run.yaml", RunConfig).pre.weight == pytest.approx(1e-3)
    assert parse("[1e, e3, 1e-, v1e3]") == ["1e", "e3", "1e-", "v1e3"]


@pytest.mark.parametrize("value", (2**31, 10**30, -(10**30), True, 1.0, "1", None))
@pytest.mark.parametrize("name", ("micro_batch", "checkpoint_every", "accumulation"))
def test_counts_are_counts(name: str, value: Any) -> None:
    """Of whoever makes the settings."""
    for make in (lambda: RunConfig(**{name: value}), lambda: from_dict(RunConfig, {name: value})):
        with pytest.raises(ValueError, match=f"^{name}: expected an integer"):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: RunConfig(seed=2**63), "seed: expected an integer of at most"),
        (lambda: RunConfig(grad_clip=float("inf")), "grad_clip: expected a finite number"),
        (lambda: PReSettings(weight=float("nan")), "weight: expected a finite number"),
        (lambda: StageConfig("a", steps=1, pre=1), "pre: expected true or false"),  # type: ignore[arg-type]
        (lambda: TransferConfig(lr=float("inf")), "lr: expected a finite number"),
        (lambda: TransferConfig(warmup=-1), "warmup: expected at least 0"),
        (lambda: ExperimentConfig(seeds=10**9), "seeds: expected at most 10000"),
        (lambda: ModelConfig(width=10**9), "width: expected at most 65536"),
        (lambda: RunConfig(micro_batch=10**9), "micro_batch: expected at most 65536"),
        (lambda: TowerConfig(batch=10**9), "batch: expected at most 65536"),
        (lambda: TowerConfig(min_digits=-3), "min_digits: expected at least 1"),
        (lambda: TowerConfig(max_digits=2), "max_digits: expected at least min_digits"),
    ),
)
def test_settings_are_in_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        (BOMB, "expected at most 100000 values, aliases followed"),
        ("&a [*a]", "expected at most 100000 values"),
        ("[" * 1000, "nested too deeply"),
        ("{a: " * 1000, "nested too deeply"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("# " + "x" * 2**20, "expected at most 1048576 bytes"),
        (b"\xff\xfe\x00", "codec can't decode"),
        ("a\x00b: 1", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("x: " + "y" * 10_000, "unknown key"),
    ),
)
def test_files_that_are_no_settings(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"run\.yaml: .*{message}") as caught:
        load_config(path, RunConfig)
    assert len(str(caught.value)) < 1500


def test_pre_must_fit_the_decoder() -> None:
    with pytest.raises(ValueError, match="layer: expected at most 6"):
        RunConfig(stages=(StageConfig("a", steps=1, pre=True),), pre=PReSettings(layer=7))
