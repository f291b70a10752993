# SPDX-License-Identifier: Apache-2.0
"""Directories that hold what a page's commands name, under these names and at tiny sizes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from prereg_kernels.demo.data.packing import build_tokenizer
from prereg_kernels.demo.data.scenes import SceneConfig
from prereg_kernels.demo.model.llava import build_model
from tests.checkup.pictures import save_folder, save_model
from tests.demo.tiny import MODEL, TOWER
from tests.docs.pages import ROOT, page_of
from tests.train.models import make_clip, make_llama
from tests.train.places import make_place


def checkups(place: Path) -> None:
    """Models, images in one folder and in one a class, and masks of both kinds."""
    save_model(place / "MODEL")
    for name in ("BASELINE", "PRE"):
        shutil.copytree(place / "MODEL", place / name)
    scenes = SceneConfig()
    demo = build_model(MODEL, scenes, build_tokenizer(scenes), seed=0)
    demo.save_pretrained(place / "runs/scenes/seed-0/baseline/checkpoints/step-00000350")
    save_folder(place / "made")
    pictures = sorted((place / "made" / "images").rglob("*.png"))
    for folder in ("photos", "val2017", "stuffthingmaps/val2017"):
        (place / folder).mkdir(parents=True)
    for path in pictures:
        shutil.copy(path, place / "photos")
        shutil.copy(path, place / "val2017")
        mask = place / "made" / "masks" / path.parent.name / path.name
        shutil.copy(mask, place / "stuffthingmaps" / "val2017")
    shutil.copy(pictures[0], place / "photos" / "cat.png")
    (place / "made" / "images").rename(place / "imagenet-val")
    halves = [(1, 0), (2, 20)]  # two objects each, side by side
    annotations = [
        {"image_id": i, "id": 10 * i + category, "category_id": category, "iscrowd": 0,
         "segmentation": [[x, 8, x + 20, 8, x + 20, 32, x, 32]], "area": 480}
        for i in range(len(pictures)) for category, x in halves
    ]  # fmt: skip
    facts = [
        {"id": i, "file_name": path.name, "height": 32, "width": 40}
        for i, path in enumerate(pictures)
    ]
    kinds = [{"id": 1, "name": "left"}, {"id": 2, "name": "right"}]
    content = {"images": facts, "annotations": annotations, "categories": kinds}
    (place / "instances_val2017.json").write_text(json.dumps(content))


def training(place: Path) -> None:
    """The page's first run, in a few steps."""
    text = next(
        block.text for block in page_of("docs/demo-loop.md").blocks if block.language == "yaml"
    )
    (place / "run.yaml").write_text(in_few_steps(text))


def recipe(place: Path) -> None:
    """The page's settings; a model, its parts, and data."""
    text = next(b.text for b in page_of("docs/training.md").blocks if b.language == "yaml")
    (place / "recipe.yaml").write_text(text)
    make_place(place)
    for old, new in (("model", "MODEL"), ("data.json", "train.json")):
        (place / old).rename(place / new)
    shutil.copy(place / "train.json", place / "held_out.json")
    make_clip(place / "CLIP")
    make_llama(place / "LLM")


def in_few_steps(run: str) -> str:
    """A run's settings, of a smaller model and with small counts."""
    settings = yaml.safe_load(run)
    for stage in settings["stages"]:
        stage |= {"steps": 2, "warmup": 1}
    counts = {"micro_batch": 2, "questions_per_scene": 4, "checkup_every": 2, "checkup_scenes": 24}
    settings |= {name: counts[name] for name in counts.keys() & {*settings, "micro_batch"}}
    settings["model"] = asdict(replace(MODEL, decoder_layers=4))
    settings["tower"] = asdict(TOWER)
    return yaml.safe_dump(settings)


def examples(place: Path) -> None:
    """The scripts side by side."""
    shutil.copytree(ROOT / "examples", place, dirs_exist_ok=True)


def checkout(place: Path) -> None:
    """A checkout with a demo and a sweep in runs/, those whose figures the README has."""
    for name in ("benchmarks", "docs"):
        shutil.copytree(ROOT / name, place / name)
    shutil.copy(ROOT / "README.md", place)
    results = place / "benchmarks" / "results"
    demo, sweep = place / "runs" / "scenes", place / "runs" / "sweep-scenes"
    demo.mkdir(parents=True)
    shutil.copytree(results / "few_shot", sweep)
    commit = ["commit", "-q", "--allow-empty", "-m", "A checkout"]
    for arguments in (["init", "-q"], ["-c", "user.name=A", "-c", "user.email=a@b.c", *commit]):
        subprocess.run(["git", *arguments], cwd=place, check=True)
    shutil.copy(results / "demo.json", demo / "summary.json")
    shutil.copy(results / "cpu.json", place / "FILE.json")
    curves = {"lm_loss": {"eager": [2.0, 1.0, 0.5], "fused": [2.0, 1.1, 0.4]}}
    (place / "FILE").write_text(json.dumps({"window": 2, "curves": curves}))


PLACES: dict[str, Callable[[Path], None]] = {
    "README.md": checkups,
    "docs/checkup.md": checkups,
    "docs/integrations.md": checkups,
    "docs/training.md": recipe,
    "docs/evaluate.md": recipe,
    "docs/demo-loop.md": training,
    "examples": examples,
    "benchmarks": checkout,
    "docs/gpu.md": checkout,
}
