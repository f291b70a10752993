# SPDX-License-Identifier: Apache-2.0
"""Each format has a run of the command: as data with an index, and as a stream."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from prereg_kernels.train import streaming
from prereg_kernels.train.config import load_config
from prereg_kernels.train.run import train
from prereg_kernels.train.trainer import RecipeTrainer
from tests.train.places import make_place, metrics, settings, timeless, write

SHARDS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_forms(make_place(tmp_path_factory.mktemp("place")))


def make_forms(place: Path) -> Path:
    """The same samples in each format, with some of them in one shard and some in others."""
    llava = json.loads((place / "data.json").read_text())
    messages = [as_messages(record) for record in llava]
    for name, records in (("llava", llava), ("messages", messages)):
        (place / f"{name}.json").write_text(json.dumps(records))
        (place / name).mkdir()
        for shard in range(SHARDS):
            lines = [json.dumps(record) for record in records[shard::SHARDS]]
            (place / name / f"{shard}.jsonl").write_text("\n".join(lines))
    features = datasets.Features(
        id=datasets.Value("string"),
        messages=[{"role": datasets.Value("string"),
                   "content": [{"type": datasets.Value("string"),
                                "text": datasets.Value("string")}]}],
        images=[datasets.Image()],
    )  # fmt: skip
    rows = [
        {**record, "id": str(number),
         "images": [{"bytes": (place / "images" / image).read_bytes(), "path": None}
                    for image in record["images"]]}
        for number, record in enumerate(messages)
    ]  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(place / "saved"))
    for shard in range(SHARDS):
        part = datasets.Dataset.from_list(rows[shard::SHARDS], features=features)
        part.to_parquet(place / "hub" / f"train-{shard:05d}-of-{SHARDS:05d}.parquet")
    turns = [
        {"conversations": record["conversations"],
         "image": [(place / "images" / image).read_bytes() for image in record["image"]]}
        for record in llava
    ]  # fmt: skip
    datasets.Dataset.from_list(turns).to_parquet(place / "llava.parquet")
    folder = place / "folder"  # of images, with a file beside them that says what they are
    folder.mkdir()
    for path in (place / "images").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, messages)))
    (place / "tar").mkdir()
    for shard in range(SHARDS):
        write_shard(place, shard, llava[shard::SHARDS])
    return place


def as_messages(record: Any) -> dict[str, Any]:
    question, answer = (turn["value"] for turn in record["conversations"])
    images = record["image"]
    asked = [{"type": "image", "text": None} for _ in images]
    asked.append({"type": "text", "text": question.replace("<image>\n", "")})
    return {
        "images": images,
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    }


def write_shard(place: Path, shard: int, records: list[Any]) -> None:
    with tarfile.open(place / "tar" / f"{shard}.tar", "w") as tar:
        for number, record in enumerate(records):
            files = {"json": json.dumps(record).encode()}
            for part, image in enumerate(record["image"]):
                files[f"{part}.png"] = (place / "images" / image).read_bytes()
            for name, content in files.items():
                facts = tarfile.TarInfo(f"{number:04d}.{name}")
                facts.size = len(content)
                tar.addfile(facts, io.BytesIO(content))


def run(place: Path, out: Path, data: dict[str, Any], **changes: Any) -> Path:
    """What the command does, of one stage."""
    stage = {"name": "tune", "trainable": ["projector", "llm"], "max_steps": 3}
    values = settings(place, out, **{"stages": [stage], **changes})
    values["data"] = [{**data, "path": str(place / data["path"])}]
    path = write(out.parent / f"{out.name}.yaml", values)
    return train(load_config(path))


IMAGES = {"images": "images"}
FORMS: dict[str, dict[str, Any]] = {
    "llava JSON": {"path": "llava.json", "format": "llava"},
    "llava JSONL": {"path": "llava", "format": "llava"},
    "llava Parquet": {"path": "llava.parquet", "format": "llava"},
    "messages JSON": {"path": "messages.json"},
    "messages JSONL": {"path": "messages"},
    "saved": {"path": "saved"},
    "hub": {"path": "hub"},  # a folder as `load_dataset` takes it, which a name on the hub is too
    "folder": {"path": "folder"},
    "webdataset": {"path": "tar", "format": "webdataset"},
}


def data_of(place: Path, form: str) -> dict[str, Any]:
    has_paths = "JSON" in form
    return {**FORMS[form], **({"images": str(place / "images")} if has_paths else {})}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def losses(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Of the JSON lists."""
    found = {}
    for name in ("llava", "messages"):
        data = data_of(place, f"{name} JSON")
        out = run(place, tmp_path_factory.mktemp(name) / "out", data)
        found[name] = [line["lm_loss"] for line in metrics(out, "tune")]
    return found


SAME = {"llava Parquet": "llava", "saved": "messages", "folder": "messages"}


@pytest.mark.parametrize("form", [form for form in FORMS if form.split()[-1] != "JSON"])
def test_a_format(place: Path, tmp_path: Path, losses: dict[str, list[float]], form: str) -> None:
    """The same samples in the same order train to the same losses, whatever they are read from.

    In shards they stand in another order.
    """
    out = run(place, tmp_path / "out", data_of(place, form))
    found = [line["lm_loss"] for line in metrics(out, "tune")]
    if form in SAME:
        assert found == losses[SAME[form]]
    assert len(found) == 3 and found[-1] < found[0]
    assert not (out / "bad_samples.jsonl").exists()


STREAMS = ("llava JSONL", "llava Parquet", "saved", "hub", "webdataset")


@pytest.mark.parametrize("form", STREAMS)
def test_a_stream(place: Path, tmp_path: Path, form: str) -> None:
    out = run(place, tmp_path / "out", {**data_of(place, form), "streaming": True})
    found = [line["lm_loss"] for line in metrics(out, "tune")]
    assert len(found) == 3 and found[-1] < found[0]
    assert not (out / "bad_samples.jsonl").exists()


class Crash(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


PACKED = {
    "packing_length": 200, "max_length": 150, "trainer__per_device_train_batch_size": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "workers", "packing"),
    [("hub", 0, {}), ("messages JSONL", 2, {}), ("hub", 2, PACKED)],
)
def test_a_stream_is_gone_on_with(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    workers: int,
    packing: dict[str, Any],
) -> None:
    """In the middle of a block and of an epoch: bitwise the run that was not interrupted."""
    monkeypatch.setattr(streaming, "BLOCK", 10)
    data = {**data_of(place, form), "streaming": True}
    changes = {
        "stages__0__max_steps": 7, "stages__0__gradient_accumulation_steps": 2,
        "trainer__dataloader_num_workers": workers, **packing,
    }  # fmt: skip
    whole = run(place, tmp_path / "whole", data, **changes)
    counts = json.loads((whole / "stages/tune/checkpoint-7/bad_samples.json").read_text())
    if packing:  # several samples in most rows, and so one epoch and a part of the next
        assert counts["bad"] == 0 and counts["seen"] > max(2 * 14, 24)
    make = RecipeTrainer.__init__

    def crashing(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(Crash())

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RecipeTrainer, "__init__", crashing)
        run(place, tmp_path / "out", data, **changes)
    out = run(place, tmp_path / "out", data, **changes)
    for file in ("model.safetensors", "pre/pre_heads.safetensors"):
        ours, theirs = load_file(out / file), load_file(whole / file)
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert timeless(out, "tune") == timeless(whole, "tune")
    assert epochs(out) == epochs(whole) == pytest.approx([step / 7 for step in range(1, 8)])


def epochs(out: Path) -> list[float]:
    """As the logs have it."""
    state = json.loads((out / "stages/tune/checkpoint-7/trainer_state.json").read_text())
    return [log["epoch"] for log in state["log_history"]]


def test_bad_samples_of_a_stream(place: Path, tmp_path: Path) -> None:
    """Named by file and line, or by the row's id."""
    lines = (place / "llava" / "0.jsonl").read_text().splitlines()
    (tmp_path / "images").symlink_to(place / "images")
    lines[2] = "{no JSON"
    lines[4] = json.dumps({**json.loads(lines[4]), "image": ["../secret.png"]})
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines) + "\n")
    data = {"path": str(path), "format": "llava", "images": str(place / "images")}
    out = run(place, tmp_path / "out", {**data, "streaming": True}, max_bad=2)
    written = [json.loads(x) for x in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert {(x["where"], x["reason"]) for x in written} >= {(f"{path}:3", "not valid JSON")}


def test_a_stream_needs_steps(place: Path, tmp_path: Path) -> None:
    stage = {"name": "tune", "num_train_epochs": 1}
    data = {**data_of(place, "hub"), "streaming": True}
    with pytest.raises(ValueError, match="max_steps: expected a number of steps for stage tune"):
        run(place, tmp_path / "out", data, stages=[stage])
