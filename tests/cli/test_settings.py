# SPDX-License-Identifier: Apache-2.0
"""Flags of settings: one for each field, the file's values as defaults, errors by name."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from prereg_kernels._util.settings_file import from_dict, to_dict
from prereg_kernels.cli.demo import load_preset, load_sweep
from prereg_kernels.cli.settings import override, show
from prereg_kernels.demo.config import RunConfig


def leaves(settings: Any, path: str = "") -> dict[str, Any]:
    """{flag: value} of each setting that is not made of others."""
    if is_dataclass(settings):
        parts = {item.name: getattr(settings, item.name) for item in fields(settings)}
    elif isinstance(settings, dict):
        parts = settings
    elif isinstance(settings, tuple) and settings and is_dataclass(settings[0]):
        parts = {str(i): item for i, item in enumerate(settings)}
    else:
        return {path: settings}
    found = {}
    for name, value in parts.items():
        found |= leaves(value, f"{path}.{name}" if path else f"--{name}")
    return found


@pytest.mark.parametrize("settings", [load_preset("scenes"), RunConfig()], ids=["preset", "run"])
def test_every_setting_is_a_flag(settings: Any) -> None:
    """Given as they stand, all of them at once change nothing, types included."""
    flags: list[str] = []
    found = leaves(settings)
    for flag, value in found.items():
        if isinstance(value, bool):
            head, _, name = flag.rpartition(".")
            flags.append(flag if value else f"{head}.no_{name}")
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    assert len(found) > 50
    assert override(settings, flags) == settings
    assert repr(override(settings, flags)) == repr(settings)


def test_flags_win_over_the_file() -> None:
    preset = load_preset("scenes")
    flags = (
        "--run.pre.weight 0.25 --run.stages.1.steps 9 --run.stages.0.trainable llm projector "
        "--run.distinct_scenes 5 --run.families.read 3 --transfer.lr 1e-3 --run.stages.1.no_pre "
        "--run.stages.0.pre --evaluation_scenes 7 --run.tower.seed 4"
    )
    values = to_dict(preset)
    values["run"]["pre"]["weight"] = 0.25
    values["run"]["stages"][1] |= {"steps": 9, "pre": False}
    values["run"]["stages"][0] |= {"trainable": ["llm", "projector"], "pre": True}
    values["run"]["distinct_scenes"] = 5
    values["run"]["families"]["read"] = 3.0
    values["run"]["tower"]["seed"] = 4
    values["transfer"]["lr"] = 1e-3
    values["evaluation_scenes"] = 7
    assert override(preset, flags.split()) == from_dict(type(preset), values)
    assert override(preset, []) is preset


def test_flags_of_a_sweep() -> None:
    sweep = load_sweep("scenes")
    flags = ["--weights", "0.5", "2", "--layers", "--long_tail", "None", "--no_transfer"]
    found = override(sweep, flags)
    assert found == replace(sweep, weights=(0.5, 2.0), layers=(), long_tail=None, transfer=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nope 3", "unknown flags: --nope, 3; --settings lists all flags"),
        ("--run.families.nope 1", "unknown flags: --run.families.nope, 1; --settings lists"),
        ("--run.stages.2.steps 3", "unknown flags: --run.stages.2.steps, 3; --settings lists"),
        ("stray", "unknown flags: stray; --settings lists"),
        ("--run.pre.weight x", "--run.pre.weight: could not convert string to float: 'x'; "),
        ("--run.seed 1.5", "--run.seed: invalid literal for int() with base 10: '1.5'; "),
        ("--run.stages.1.steps", "Missing value for argument '--run.stages.1.steps'. Expected 1"),
        ("--run.pre.weight -1", "--run.pre.weight: expected a positive number, got -1.0"),
        ("--run.pre.weight nan", "--run.pre.weight: expected a finite number, got nan"),
        (
            "--run.pre.anchor x",
            "--run.pre.anchor: expected one of ('pre_llm', 'pre_projector', 'other_scene', ",
        ),
        ("--run.pre.layer 7", "--run.pre.layer: expected at most 6, the decoder's depth, got 7"),
        ("--run.stages.1.lr 0", "--run.stages.1.lr: expected a positive number, got 0.0"),
        ("--evaluation_scenes 0", "--evaluation_scenes: expected at least 1, got 0"),
        ("--run.stages.1.no_pre", "--run.stages: expected a stage with pre: true, got none"),
    ],
)
def test_errors_name_the_flag(flags: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        override(load_preset("scenes"), flags.split())
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value) and not set("╭│─╰") & set(str(refused.value))


def test_the_list_has_meanings_and_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    show(override(load_preset("scenes"), ["--run.pre.weight", "0.125"]), "demo")
    page = capsys.readouterr().out
    assert page.startswith("usage: prereg demo")
    text = " ".join(page.replace("│", " ").split())
    assert "--run.pre.weight FLOAT of L_PRe beside L_LM. (default: 0.125)" in text
    assert "--run.tower.batch INT scenes a step. (default: 32)" in text
    assert set(leaves(load_preset("scenes"))) <= set(re.findall(r"--[\w.]+", text))
    documented = [x for x in text.split(" --") if " (default" in x and "run.families" not in x]
    assert len(documented) > 50
    for setting in documented:
        assert len(setting.split("(default")[0].split()) > 2, setting


def test_help_does_not_load_it() -> None:
    code = "import sys; sys.argv[1:] = ['--help']; from prereg_kernels.cli import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if "|" in line}
    assert "prereg_kernels.cli.commands" in loaded
    assert not loaded & {"tyro", "prereg_kernels.demo", "yaml", "transformers"}
