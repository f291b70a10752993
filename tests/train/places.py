# SPDX-License-Identifier: Apache-2.0
"""A folder with a tiny LLaVA, images, a LLaVA JSON and settings."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from prereg_kernels.train.throughput import TIMED
from tests.packages.checkpoint import make_llava, make_samples

SETTINGS: dict[str, Any] = {
    "stages": [
        {"name": "align", "trainable": ["projector"], "max_steps": 2, "pre": None},
        {"name": "tune", "trainable": ["projector", "llm"], "num_train_epochs": 1},
    ],
    "pre": {"weight": 0.5},
    "trainer": {
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True,
        "logging_steps": 1, "save_steps": 2, "report_to": "none", "disable_tqdm": True,
    },
}  # fmt: skip


def make_place(folder: Path) -> Path:
    """The model in model/, images in images/, data.json with 24 samples, a quarter text alone."""
    make_llava(folder / "model")
    records = [
        {
            "id": number,
            "image": [Path(path).name for path in sample["images"]],
            "conversations": [
                {
                    "from": "human",
                    "value": "<image>\n" * len(sample["images"]) + sample["question"],
                },
                {"from": "gpt", "value": sample["answer"]},
            ],
        }
        for number, sample in enumerate(make_samples(folder / "images"))
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def settings(place: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Of two stages in `out`; keys of `changes` are paths: trainer__max_steps, stages__1__pre."""
    data = {"path": str(place / "data.json"), "images": str(place / "images"), "format": "llava"}
    values = {
        "model": str(place / "model"), "out": str(out), "data": [data], **copy.deepcopy(SETTINGS),
    }  # fmt: skip
    for path, value in changes.items():
        *steps, last = path.split("__")
        inside: Any = values
        for step in steps:
            inside = inside[int(step)] if isinstance(inside, list) else inside[step]
        inside[int(last) if isinstance(inside, list) else last] = value
    return values


def write(path: Path, values: Any) -> Path:
    """As a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(out: Path, stage: str) -> list[dict[str, Any]]:
    """The lines of a stage's regular logs."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and "learning_rate" in line]


def timeless(out: Path, stage: str) -> list[dict[str, Any]]:
    """The same without what another run of the same has otherwise."""
    left_out = {"epoch", *TIMED}
    return [
        {name: x for name, x in line.items() if name not in left_out}
        for line in metrics(out, stage)
    ]


def close(a: Path, b: Path) -> None:
    """Two files of weights, up to what rounding makes of them in some steps of AdamW."""
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=2e-5, msg=name)
