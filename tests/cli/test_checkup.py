# SPDX-License-Identifier: Apache-2.0
"""`prereg checkup` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prereg_kernels.cli.checkup import _names
from tests.checkup.pictures import noise, save_folder, save_model
from tests.cli.run import Command


@pytest.fixture
def prereg(place: Path, prereg_here: Command) -> Command:
    """The command at that place."""

    def run(*arguments: str, command: str = "checkup") -> Any:
        return prereg_here(command, *arguments, cwd=place)

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("command")
    save_folder(place, 12)
    (place / "images" / "dark" / "zz.png").write_text("not an image")
    save_model(place / "a" / "model")
    save_model(place / "b" / "model", processor=False)
    return place


def test_two_models(place: Path, prereg: Command) -> None:
    arguments = [
        "a/model", "--compare", "b/model", "--images", "images", "--masks", "masks",
        "--processor", "a/model", "--splits", "2", "--out", "out",
    ]  # fmt: skip
    run = prereg(*arguments)
    assert run.returncode == 0, run.stderr
    numbers = json.loads((place / "out" / "checkup.json").read_text())
    assert [model["name"] for model in numbers["models"]] == ["a", "b"]
    assert numbers["headline"].startswith("b against a at layer 2 of 4: image probe accuracy")
    assert " ".join(numbers["headline"].split()[:8]) in run.stdout
    for model in numbers["models"]:
        assert model["headline"].startswith("From the input to layer 2 of 4, image probe accuracy")
    assert numbers["models"][0]["skipped"] == {"damaged, or not an image": ["dark/zz.png"]}
    # the same random weights: what one says of an image, the other does
    assert set(numbers["differences"]["contrast"]["value"]) == {0}
    assert "1 skipped: damaged" in run.stdout
    assert "tokens are shown as numbers" in run.stdout
    page = (place / "out" / "checkup.html").read_text()
    assert "b against a" in page

    before = {p: p.stat().st_mtime_ns for p in (place / "out" / "shards").rglob("*.safetensors")}
    again = prereg(*arguments, "--json", command="diagnose")  # its name in version 0.1
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == numbers
    after = {p: p.stat().st_mtime_ns for p in (place / "out" / "shards").rglob("*.safetensors")}
    assert after == before  # nothing was measured again


def test_a_model_without_processor_files(place: Path, prereg: Command) -> None:
    """The family's usual processor is used, and the page says so."""
    Image.fromarray(noise(8, 8)).save(place / "images" / "dark" / "yy.png")
    images = ("--images", "images/dark", "--maps", "03.png@1,2")
    run = prereg("b/model", *images, "--splits", "2", "--out", "out-b")
    assert run.returncode == 0, run.stderr
    assert "masks bring the contrast of patches" in run.stdout
    page = (place / "out-b" / "checkup.html").read_text()
    assert "There is no image processor in model: the family&#39;s usual one was used" in page
    assert "patch_size 4, merge_size 2" in page
    assert "masks bring the contrast of patches" in page
    assert re.findall(r"<h3>(.+)</h3>", page) == ["03.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "--images", "images"], "absent: expected a model directory, with a config"),
        (["images", "--images", "images"], "images: expected a model directory"),
        (["text", "--images", "images"], "text: model_type 'llama': the places of its visual"),
        (["bare", "--images", "images"], "bare: expected weights in *.safetensors files, got none"),
        (["blind", "--images", "images"], "model: expected an embedding of the image token"),
        (
            ["cut", "--images", "images"],
            "cut/model.safetensors: expected a whole safetensors file:",
        ),
        (["part", "--images", "images"], "part: expected weights of the whole model, 2 are miss"),
        (["a/model", "--images", "absent"], "images: expected a directory, got absent"),
        (["a/model", "--images", "images", "--masks", "no.json"], "no.json"),
        (["a/model", "--images", "images", "--labels", "no.csv"], "no.csv"),
        (["a/model", "--images", "images", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (
            ["a/model", "--images", "images", "--masks", "masks", "--purity", "2"],
            "purity: expected a share in (0, 1]",
        ),
        (["a/model", "--images", "images", "--purity", "1"], "--purity: goes with --masks"),
        (["a/model", "--images", "images", "--background", "0"], "--background: goes with --masks"),
        (
            ["a/model", "--images", "images", "--masks", "x.json", "--masks-are", "classes"],
            "--masks-are: goes with masks in PNG files, not with COCO's annotations",
        ),
        (["b/model", "--images", "images", "--compare", "a/model"], "same image processor, got"),
        (["a/model", "--images", "images", "--device", "moon"], "--device: 'moon' is not usable"),
        (["a/model", "--images", "images", "--device", "meta"], "--device: 'meta' is not usable"),
        (["a/model", "--images", "images", "--processor", "no"], "no: expected an image processor"),
        (["a/model", "--images", "images", "--compare", "a/model"], "--compare: expected another"),
        (["a/model", "--images", "images", "--names", "x", "y"], "--names: expected 1 different"),
        (["a/model", "--images", "images", "--names", "../x"], "--names: expected names without"),
        (["a/model", "--images", "broken"], "images: expected at least one that can be used"),
        (["a/model", "--scenes", "--masks", "masks"], "--masks: goes with --images"),
        (["a/model", "--scenes"], "scenes: need a LLaVA"),
        (
            ["a/model", "--images", "images", "--maps", "no.png@1,2"],
            "images that are measured, such as dark/01.png, got no.png; --limit says how many are",
        ),
        (
            ["a/model", "--images", "images", "--device", "cpu", "--device-map", "auto"],
            "--device-map: chooses the devices itself; expected no --device",
        ),
        (["a/model"], "one of the arguments --images --scenes is required"),
    ],
)
def test_errors_are_one_line(
    place: Path, prereg: Command, arguments: list[str], message: str
) -> None:
    if not (place / "broken").exists():
        _bad_models(place)
    run = prereg(*arguments, "--out", "errors")
    assert run.returncode == 2, run.stdout
    assert message in run.stderr
    assert run.stderr.startswith("prereg: ")
    assert run.stderr.count("\n") == 1


def _bad_models(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    (place / "broken").mkdir()
    (place / "broken" / "a.png").write_text("no")
    (place / "text").mkdir()
    (place / "text" / "config.json").write_text('{"model_type": "llama"}')
    config = (place / "a" / "model" / "config.json").read_text()
    weights = load_file(place / "a" / "model" / "model.safetensors")
    for name in ("bare", "cut", "part"):
        (place / name).mkdir()
        (place / name / "config.json").write_text(config)
    (place / "blind").mkdir()
    without = json.loads(config) | {"image_token_id": 10**6}
    (place / "blind" / "config.json").write_text(json.dumps(without))
    save_file(weights, place / "blind" / "model.safetensors", metadata={"format": "pt"})
    whole = (place / "a" / "model" / "model.safetensors").read_bytes()
    (place / "cut" / "model.safetensors").write_bytes(whole[:1000])
    kept = {key: x for key, x in weights.items() if "layers.1.mlp.gate" not in key}
    missing = len(weights) - len(kept)
    assert missing == 1
    kept.pop(next(key for key in kept if key.endswith("embed_tokens.weight")))
    save_file(kept, place / "part" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/model"], ["model"]),
        (["x/a", "x/b"], ["a", "b"]),
        (["run/baseline/step-1", "run/pre/step-1"], ["baseline", "pre"]),
        (["run/a/checkpoints/step-1"], ["a"]),
        (["run/a/step-1", "run/b/step-2"], ["a", "b"]),
        (["run/a/checkpoint-1", "run/a/checkpoint-2"], ["checkpoint-1", "checkpoint-2"]),
        (["/a", "/b/a"], ["first", "second"]),
    ],
)
def test_names_tell_models_apart(paths: list[str], names: list[str]) -> None:
    assert _names([Path(path) for path in paths], None) == names
