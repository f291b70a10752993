# SPDX-License-Identifier: Apache-2.0
"""The command: one process against the definition, two against one, errors in a line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prereg_kernels.train.config import load_config
from prereg_kernels.train.dry_run import describe_run
from prereg_kernels.train.run import train
from tests.cli.run import Command, unread
from tests.packages.definition import errors, gradients
from tests.packages.run import Run
from tests.train.launching import PREREG, start, torchrun
from tests.train.places import close, make_place, metrics, settings, write

HIDDEN = ("lm_hidden_grad_norm", "pre_hidden_grad_norm", "hidden_grad_cosine")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def test_a_step_s_gradients_are_the_definition_s(place: Path, tmp_path: Path) -> None:
    """Of two micro-batches, of several layers; the last stage of two."""
    out = tmp_path / "out"
    path = write(tmp_path / "c.yaml", settings(
        place, out, pre={"layers": [2, 3], "weight": 0.7}, stages__1__trainer={},
        stages__1__max_steps=2, stages__1__gradient_accumulation_steps=2,
        stages__1__trainable=["tower", "projector", "llm"],
    ))  # fmt: skip
    done = start(*PREREG, "train", str(path), cwd=tmp_path, RECORDED=str(tmp_path / "recorded"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"model: {out}" in done.stdout
    run = Run(tmp_path / "recorded", out, done.stdout)
    for number in range(2):
        step = run.step(number)
        assert len(step["batches"]) == 2
        expected = gradients(out / "stages/align/model", run, step, 0.7)
        assert max(errors(step["gradients"], expected).values()) < 1e-5


def test_two_ranks_are_one(place: Path, tmp_path: Path) -> None:
    """The same losses and weights, where steps are of text alone, and layers checkpointed."""
    changes: dict[str, Any] = {"stages__1__max_steps": 6, "trainer__save_steps": 3}
    one, two = tmp_path / "one", tmp_path / "two"
    path = write(tmp_path / "one.yaml", settings(place, one, **changes))
    done = start(*PREREG, "train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    half = {
        **changes, "trainer__per_device_train_batch_size": 2,
        "trainer__gradient_checkpointing": True,
    }  # fmt: skip
    path = write(tmp_path / "two.yaml", settings(place, two, **half))
    done = start(*torchrun(2), "train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in ("align", "tune"):
        for a, b in zip(metrics(one, stage), metrics(two, stage), strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() & {"lm_loss", "pre_loss", "grad_norm", *HIDDEN}:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    assert {*HIDDEN} <= metrics(one, "tune")[0].keys()
    close(one / "model.safetensors", two / "model.safetensors")
    close(one / "pre/pre_heads.safetensors", two / "pre/pre_heads.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: config"),
        (("--preset", "scenes"), "the digits are another command: prereg demo --preset scenes"),
        (("absent.yaml",), "absent.yaml"),
        (("c.yaml", "--trainer.bf17", "true"), "c.yaml: trainer.bf17: unknown key"),
        (("c.yaml", "--data.0.path", "absent.json"), "absent.json: expected a file or a folder"),
        (("c.yaml", "--model", "absent"), "model: "),
        (("c.yaml", "--model", "models/mistyped/x"), "model: expected a file or a folder that is"),
        (("c.yaml", "--data.0", "{path: ./mistyped}"), "data: expected a file or a folder that"),
    ],
)
def test_an_error_is_a_line(
    place: Path,
    tmp_path: Path,
    prereg_here: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(tmp_path / "c.yaml", settings(place, tmp_path / "out"))
    done = prereg_here("train", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    [line] = [x for x in done.stderr.splitlines() if x.startswith("prereg: ")]
    assert message in line
    assert not (tmp_path / "out" / "stages").exists()


def test_flags_before_the_recipe(
    place: Path, tmp_path: Path, prereg_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of arguments does not matter; what is no setting is named."""
    found = []
    monkeypatch.setattr("prereg_kernels.cli.train.train", lambda config, fresh: found.append(
        (config.trainer["max_steps"], config.pre, config.out, fresh)
    ))  # fmt: skip
    path = str(write(tmp_path / "c.yaml", settings(place, tmp_path / "out")))
    flags = ("--trainer.max_steps", "10", "--pre=null", "--out", "here")
    for arguments in ((*flags, "--fresh", path), (path, "--fresh", *flags),
                      ("--fresh", *flags[:2], path, *flags[2:])):  # fmt: skip
        assert not prereg_here("train", *arguments, cwd=tmp_path).returncode
    assert found == [(10, None, "here", True)] * 3
    for arguments in (("--fresch", path), (path, "--fresch")):
        done = prereg_here("train", *arguments, cwd=tmp_path)
        assert "prereg: --fresch: expected a value after it" in done.stderr
    done = prereg_here("train", *flags, cwd=tmp_path)
    assert "the following arguments are required: config" in done.stderr


@pytest.mark.parametrize("behind", [("--dry-run",), ("--fresh",), ("--trainer.max_steps=3",), ()])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_flag_without_a_value(
    place: Path,
    tmp_path: Path,
    prereg_here: Command,
    monkeypatch: pytest.MonkeyPatch,
    behind: tuple[str, ...],
    is_first: bool,
) -> None:
    """As a shell's unset variable leaves it: it takes none of the flags behind it."""
    started: list[Any] = []
    monkeypatch.setattr("prereg_kernels.cli.train.train", lambda *a, **k: started.append(a))
    path = str(write(tmp_path / "c.yaml", settings(place, tmp_path / "out")))
    flags = ("--trainer.run_name", *behind)
    arguments = (*flags, path) if is_first else (path, *flags)
    done = prereg_here("train", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, started) == (2, "", [])
    assert "prereg: --trainer.run_name: expected a value after it" in done.stderr
    for own in ("-h", "--help"):
        assert "usage: " in prereg_here("train", path, *flags[:1], own, cwd=tmp_path).stdout
    assert not started
    named = prereg_here("train", path, "--trainer.run_name=--fresh", cwd=tmp_path)
    assert not named.returncode and started[0][0].trainer["run_name"] == "--fresh"


def test_dry_run(place: Path, tmp_path: Path, prereg_here: Command) -> None:
    """What would be trained, and what is missing; nothing is written."""
    records = json.loads((place / "data.json").read_text())
    records[0]["image"] = ["absent.png"]
    records[3]["conversations"] = []
    outside = tmp_path / "outside.png"
    outside.write_bytes((place / "images" / records[6]["image"][0]).read_bytes())
    records[6]["image"][0] = str(outside)
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    path = write(tmp_path / "c.yaml", settings(place, tmp_path / "out", data__0__path=str(data)))
    done = prereg_here("train", str(path), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    total = sum(x.numel() for x in load_file(place / "model/model.safetensors").values())
    assert f"{total:,} parameters (tower " in done.stdout
    assert "24 samples, 24 images, 6 samples of text alone" in done.stdout
    assert f"  1 images are missing:\n    {place}/images/absent.png" in done.stdout
    assert f"  2 samples cannot be used:\n    {data}:1[3]: conversations:" in done.stdout
    assert f"    {data}:1[6]: {outside}: a name or a link that leads out of" in done.stdout
    assert "stage align: 2 steps of 4 samples" in done.stdout
    assert "stage tune: 7 steps of 4 samples" in done.stdout  # 18 with images, 6 of text alone
    half_read = unread("train", str(path), "--dry-run", cwd=tmp_path)
    assert not half_read.returncode
    assert not re.search("prereg: |BrokenPipe", half_read.stderr)  # transformers has warnings there
    costs = re.findall(r"^stage (\w+): at most \S+ m?s a step.* of memory .*", done.stdout, re.M)
    assert costs == ["align", "tune"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stages__0__num_train_epochs": 4}, "28 steps of 4 samples"),
        ({"stages__0__num_train_epochs": 0.5, "data__0__weight": 1.5}, "5 steps of 4 samples"),
        ({"packing_length": 256}, "9 steps of 4 rows of samples"),
        ({"packing_length": 120, "trainer__gradient_accumulation_steps": 2,
          "trainer__per_device_train_batch_size": 1}, "21 steps of 2 rows of samples"),
        ({"stages__0__max_steps": 3, "packing_length": 256}, "3 steps of 4 rows of samples"),
    ],
)  # fmt: skip
def test_steps_of_a_dry_run_are_those_of_the_run(
    place: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    stage = {"name": "tune", "trainable": ["projector"]}
    values = settings(place, tmp_path / "out", stages=[stage], max_length=100, pre=None, **changes)
    records = json.loads((place / "data.json").read_text())
    for record in records[::3]:
        record["conversations"][1]["value"] *= 12
    (tmp_path / "data.json").write_text(json.dumps(records))
    values["data"][0]["path"] = str(tmp_path / "data.json")
    config = load_config(write(tmp_path / "c.yaml", values))
    said = describe_run(config).splitlines()[-1]
    assert said.startswith(f"stage tune: {expected}, ")
    assert len(metrics(train(config), "tune")) == int(expected.split()[0])
