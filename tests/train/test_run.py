# SPDX-License-Identifier: Apache-2.0
"""Runs of `prereg train`, in this process, on a tiny LLaVA."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    TrainerCallback,
)

from prereg_kernels.train import trainer as trainer_module
from prereg_kernels.train.config import load_config
from prereg_kernels.train.run import Stopped, train
from prereg_kernels.train.trainer import RecipeTrainer
from tests.train.places import make_place, metrics, settings, timeless, write

PROJECTOR = "multi_modal_projector."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def run(place: Path, out: Path, *, fresh: bool = False, **changes: Any) -> Path:
    path = write(out.parent / f"{out.name}.yaml", settings(place, out, **changes))
    return train(load_config(path), fresh=fresh)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def heads(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "pre" / "pre_heads.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].equal(after[name])}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the settings as they are, never interrupted."""
    return run(place, tmp_path_factory.mktemp("whole") / "out")


def test_what_a_run_leaves(place: Path, whole: Path) -> None:
    """A plain model with its processor, the heads beside it, figures, settings, versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, notes = AutoModelForImageTextToText.from_pretrained(whole, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    AutoProcessor.from_pretrained(whole)
    assert sorted(path.name for path in (whole / "stages" / "tune").glob("checkpoint-*")) == [
        "checkpoint-6", "checkpoint-7",
    ]  # fmt: skip
    assert not list(whole.rglob(".writing/*"))
    assert heads(whole) and not (whole / "stages/align/model/pre").exists()
    assert json.loads((whole / "environment.json").read_text())["torch"] == torch.__version__
    align, tune = metrics(whole, "align"), metrics(whole, "tune")
    assert [line["step"] for line in align] == [1, 2]
    assert [line["step"] for line in tune] == list(range(1, 8))
    assert all({"lm_loss", "pre_loss", "grad_norm"} <= line.keys() for line in tune)
    assert all("lm_loss" in line and "pre_loss" not in line for line in align)
    assert tune[-1]["lm_loss"] < align[0]["lm_loss"] - 0.5


def test_a_stage_trains_its_parts(place: Path, whole: Path) -> None:
    start, middle = weights(place / "model"), weights(whole / "stages/align/model")
    assert {name for name in changed(start, middle)} == {n for n in start if PROJECTOR in n}
    moved = changed(middle, weights(whole))
    assert not any("vision" in name for name in moved)
    assert {n for n in start if "vision" not in n} == moved


def test_the_baseline_differs_in_nothing_but_pre(place: Path, tmp_path: Path) -> None:
    """Bitwise: without PRe, and with a PRe of weight 0. Clipping adds up another list of norms."""
    clip = {"trainer__max_grad_norm": 0.0}
    without = run(place, tmp_path / "without", pre=None, **clip)
    nothing = run(place, tmp_path / "nothing", pre={"weight": 0.0}, **clip)
    assert same(weights(without), weights(nothing))
    assert not (without / "pre").exists()
    assert not same(weights(without), weights(run(place, tmp_path / "some", **clip)))


class Crash(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.output_dir.endswith("tune"):
            raise KeyboardInterrupt


def with_callback(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    make = RecipeTrainer.__init__

    def also(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(callback)

    monkeypatch.setattr(RecipeTrainer, "__init__", also)


@pytest.mark.parametrize("step", [1, 5])
def test_stopped_and_resumed_is_unbroken(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Before the first checkpoint of a stage, and in the middle of an epoch."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        with_callback(patch, Crash(step))
        run(place, tmp_path / "out")
    read = list[int]()
    monkeypatch.setattr("prereg_kernels.train.order.Mixture.__getitems__", counting(read))
    out = run(place, tmp_path / "out")
    assert same(weights(out), weights(whole)) and same(heads(out), heads(whole))
    assert timeless(out, "tune") == timeless(whole, "tune")
    steps_left = 7 - (step // 2) * 2
    assert len(read) == steps_left * 4  # samples of finished steps are not read again


def counting(read: list[int]) -> Any:
    from prereg_kernels.train.order import Mixture

    get = Mixture.__getitems__

    def count(self: Any, numbers: list[int]) -> Any:
        read.extend(numbers)
        return get(self, numbers)

    return count


def test_baseline_resumes_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(place, tmp_path / "whole", pre=None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        with_callback(patch, Crash(5))
        run(place, tmp_path / "out", pre=None)
    assert same(weights(run(place, tmp_path / "out", pre=None)), weights(expected))


def test_a_full_disk_leaves_the_checkpoint_before(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever file it is full: nothing of the new checkpoint is taken for one."""
    flush = trainer_module.flush

    def fail(folder: Path) -> None:
        if folder.name == "checkpoint-4" and "tune" in folder.parts:
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        flush(folder)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(trainer_module, "flush", fail)
        run(place, tmp_path / "out")
    stage = tmp_path / "out/stages/tune"
    assert [path.name for path in stage.glob("checkpoint-*")] == ["checkpoint-2"]
    assert same(weights(run(place, tmp_path / "out")), weights(whole))


def test_sigterm_saves_and_stops(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminate(Crash):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step and args.output_dir.endswith("tune"):
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped at step 4 of tune"):
        with_callback(patch, Terminate(3))
        run(place, tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "out/stages/tune/checkpoint-4").is_dir()
    assert same(weights(run(place, tmp_path / "out")), weights(whole))


def test_finished_runs_stay(place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started again, a finished run trains nothing; with other settings it is refused."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    run(place, whole)
    with pytest.raises(ValueError, match=r"other settings: pre\.weight: expected 0\.5, got 0\.25"):
        run(place, whole, pre={"weight": 0.25})
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}


def test_changed_data_are_told_of(place: Path, tmp_path: Path) -> None:
    """A run that is done, or was interrupted, is one on the data that it began with."""
    data = tmp_path / "data.json"
    data.write_bytes((place / "data.json").read_bytes())
    short = {"data__0__path": str(data), "stages__0__max_steps": 1, "stages__1__max_steps": 1}
    out = run(place, tmp_path / "out", **short)
    done = (out / "model.safetensors").stat().st_mtime_ns
    run(place, out, **short)
    content = data.read_bytes()
    data.write_bytes(content.replace(b"human", b"system", 1).replace(b" ", b"", 1))
    assert data.stat().st_size == len(content)
    with pytest.raises(ValueError, match=r"out: holds a run on other data: .*: data\.json changed"):
        run(place, out, **short)
    assert (out / "model.safetensors").stat().st_mtime_ns == done
    run(place, out, fresh=True, **short)
    assert (out / "model.safetensors").stat().st_mtime_ns > done
    data.unlink()
    run(place, out, **short)  # it is done, wherever its data are now


def test_a_start_that_failed_at_once_is_mended(place: Path, tmp_path: Path) -> None:
    """Nothing has trained, so there is nothing to go on from, or to lose."""
    data, out = tmp_path / "data.json", tmp_path / "out"
    short = {"data__0__path": str(data), "stages__0__max_steps": 1, "stages__1__max_steps": 1}
    good = (place / "data.json").read_bytes()
    data.write_bytes(good[:-9])
    with pytest.raises(ValueError, match=r"data\.json"):
        run(place, out, **short)
    data.write_bytes(good)
    for left in ("metrics.jsonl", "stages/tune/checkpoint-1/trainer_state.json"):
        (out / left).parent.mkdir(parents=True, exist_ok=True)
        (out / left).write_text('{"step": 1}')  # it has logged a step, or saved one
        with pytest.raises(ValueError, match=r"other settings: pre\.weight"):
            run(place, out, pre={"weight": 0.25}, **short)
        with pytest.raises(ValueError, match=r"holds a run on other data: .*data\.json changed"):
            run(place, out, **short)
        (out / left).unlink()
        shutil.rmtree(out / "stages", ignore_errors=True)
    (out / "metrics.jsonl").write_text('{"stage": "old", "step": 0, "checkup_probe": 1.0}\n')
    (out / "bad_samples.jsonl").write_text('{"stage": "old", "step": 2}\n')
    run(place, out, pre={"weight": 0.25}, **short)
    assert '"old"' not in (out / "metrics.jsonl").read_text()  # nor is it left beside the new ones
    assert not (out / "bad_samples.jsonl").exists()
    with pytest.raises(ValueError, match=r"pre\.weight: expected 0\.25, got 0\.5"):
        run(place, out, **short)


@pytest.mark.parametrize(
    ("second", "message"),
    [({"path": "absent.json", "format": "llava"}, "absent.json: expected a file or a folder"),
     ({"format": "llava", "images": "absent"}, "images: expected a folder, got absent")],
)  # fmt: skip
def test_data_of_a_later_stage(
    place: Path, tmp_path: Path, second: dict[str, str], message: str
) -> None:
    """What is wrong with them is said before the first stage trains."""
    first = {"path": str(place / "data.json"), "images": str(place / "images"), "format": "llava"}
    data = [first, {**first, **second}]
    with pytest.raises(ValueError, match=message):
        run(place, tmp_path / "out", data=data, stages__0__data=[0], stages__1__data=[1])
    assert not (tmp_path / "out" / "stages").exists()


def test_fresh_begins_anew(place: Path, tmp_path: Path) -> None:
    short = {"stages__1__max_steps": 1, "stages__0__max_steps": 1}
    run(place, tmp_path / "out", **short)
    (tmp_path / "out" / "mine.txt").write_text("x")
    for folder in ("wandb", "tensorboard"):
        (tmp_path / "out" / folder / "run-1").mkdir(parents=True)
    out = run(place, tmp_path / "out", fresh=True, pre=None, **short)
    assert len(metrics(out, "tune")) == 1 and "pre_loss" not in metrics(out, "tune")[0]
    assert not any((out / name).exists() for name in ("pre", "wandb", "tensorboard"))
    assert (out / "mine.txt").read_text() == "x"


def test_bad_samples_are_counted_named_and_capped(place: Path, tmp_path: Path) -> None:
    records = json.loads((place / "data.json").read_text())
    records[3]["conversations"] = []
    records[4]["image"] = ["absent.png"]
    records[8]["image"] = ["../model/config.json"]
    bad = tmp_path / "bad.json"
    bad.write_text("[" + ",\n".join(map(json.dumps, records)) + "]")
    changes: dict[str, Any] = {"data__0__path": str(bad), "stages__0__max_steps": 1}
    out = run(place, tmp_path / "out", max_bad=4, **changes)
    lines = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    found = {(line["where"], line["reason"]) for line in lines}
    assert found >= {
        (f"{bad}:4[3]", "conversations: expected a list of turns"),
        (f"{bad}:5[4]", "absent.png: no such file"),
        (f"{bad}:9[8]", "../model/config.json: a name or a link that leads out of the directory"),
    }
    with pytest.raises(
        ValueError, match=r"max_bad: \d of \d+ samples could not be used, and 1 may"
    ):
        run(place, tmp_path / "strict", **changes)


@pytest.mark.parametrize("step", [1, 5])
def test_bad_samples_after_a_resume(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Those that the interrupted run has counted count, and none of them twice."""
    records = json.loads((place / "data.json").read_text())
    for number in range(0, 24, 3):
        records[number]["conversations"] = []
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(records))
    changes: dict[str, Any] = {
        "data__0__path": str(bad), "stages__0__max_steps": 1, "stages__1__num_train_epochs": 2,
    }  # fmt: skip
    whole = run(place, tmp_path / "whole", max_bad=30, **changes)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        with_callback(patch, Crash(step))
        run(place, tmp_path / "out", max_bad=30, **changes)
    out = run(place, tmp_path / "out", max_bad=30, **changes)
    lines = (out / "bad_samples.jsonl").read_text().splitlines()
    assert lines == (whole / "bad_samples.jsonl").read_text().splitlines()
    of_tune = [line for line in map(json.loads, lines) if line["stage"] == "tune"]
    checkpoint = out / "stages/tune/checkpoint-14"
    counts = json.loads((checkpoint / "bad_samples.json").read_text())
    assert counts == {"seen": 14 * 4, "bad": len(of_tune)}
    # One more than may be is found after the checkpoint: by what came before it, or not at all
    most = len(of_tune) - 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        with_callback(patch, Crash(step))
        run(place, tmp_path / "strict", max_bad=most, **changes)
    with pytest.raises(ValueError, match=f"max_bad: {most + 1} of .* and {most} may"):
        run(place, tmp_path / "strict", max_bad=most, **changes)


def test_workers_and_tensorboard(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that worker processes make are the same; each stage has curves of its own.

    A worker's garbage collection leaves alone what it shares with this process.
    """
    with monkeypatch.context() as patch:
        patch.setattr("prereg_kernels.train.order.Mixture.__getitems__", left_alone(tmp_path))
        out = run(
            place, tmp_path / "out", trainer__dataloader_num_workers=2,
            trainer__report_to="tensorboard",
        )  # fmt: skip
    counts = {path.suffix: int(path.read_text()) for path in tmp_path.glob("frozen.*")}
    assert len(counts) == 4 and f".{os.getpid()}" not in counts  # of two stages
    assert min(counts.values()) > len(gc.get_objects()) // 2 and gc.get_freeze_count() == 0
    assert same(weights(out), weights(whole)) and same(heads(out), heads(whole))
    for stage in ("align", "tune"):
        events = EventAccumulator(str(out / "tensorboard" / stage)).Reload()
        curve = {x.step: x.value for x in events.Scalars("train/lm_loss")}
        assert curve == pytest.approx({x["step"]: x["lm_loss"] for x in metrics(out, stage)})
    assert not list(out.glob("stages/*/runs"))


def left_alone(folder: Path) -> Any:
    from prereg_kernels.train.order import Mixture

    get = Mixture.__getitems__

    def write(self: Any, numbers: list[int]) -> Any:
        (folder / f"frozen.{os.getpid()}").write_text(str(gc.get_freeze_count()))
        return get(self, numbers)

    return write


def test_weights_of_float16(place: Path, tmp_path: Path) -> None:
    """As LLaVA-1.5's on the hub: they do not train as they are, and do in float32."""
    half = tmp_path / "half"
    shutil.copytree(place / "model", half)
    model = AutoModelForImageTextToText.from_pretrained(half).half()
    model.save_pretrained(half)
    short = {"model": str(half), "stages__0__max_steps": 1, "stages__1__max_steps": 1}
    with pytest.raises(ValueError, match=r"dtype: float32}, got float16 in .*projector"):
        run(place, tmp_path / "out", **short)
    out = run(place, tmp_path / "out", fresh=True, model_arguments={"dtype": "float32"}, **short)
    assert {x.dtype for x in weights(out).values()} == {torch.float32}
    assert torch.tensor([line["loss"] for line in metrics(out, "tune")]).isfinite().all()


def test_weights_of_bfloat16(place: Path, tmp_path: Path) -> None:
    """They lose most steps of the page's learning rate, which the run says; float32 loses none."""
    half = tmp_path / "half"
    shutil.copytree(place / "model", half)
    AutoModelForImageTextToText.from_pretrained(half).bfloat16().save_pretrained(half)
    stage = {"name": "tune", "max_steps": 3, "learning_rate": 2e-5, "trainable": ["llm"]}
    changes: dict[str, Any] = {"model": str(half), "stages": [stage]}
    with pytest.warns(UserWarning) as caught:
        narrow = run(place, tmp_path / "out", pre=None, **changes)
    said = [str(x.message) for x in caught if "bfloat16" in str(x.message)]
    whole = {"model_arguments": {"dtype": "float32"}, "trainer__bf16": True}
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        wide = run(place, tmp_path / "wide", **changes, **whole)
    assert not [x for x in others if "bfloat16" in str(x.message)]
    before = {n: x for n, x in weights(half).items() if "language_model" in n and ".mlp." in n}
    kept = {}
    for out in (narrow, wide):
        after = weights(out)
        moved = [x.float() != after[name].float() for name, x in before.items()]
        kept[out] = 1 - torch.cat([x.flatten() for x in moved]).float().mean()
    assert kept[narrow] > 0.8 and kept[wide] < 0.05
    [line] = said
    count = sum(x.numel() for name, x in weights(half).items() if "language_model" in name)
    assert line.startswith(f"model: {count:,} of {count:,} numbers that train are bfloat16")


def test_few_samples_of_a_kind_are_told_of(place: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="stage align has 6 samples of text alone, fewer than"):
        run(
            place, tmp_path / "out", stages__0__max_steps=1, stages__1__max_steps=1,
            trainer__per_device_train_batch_size=8,
        )  # fmt: skip


@pytest.mark.parametrize(
    "lora",
    (
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"], "bias": "all"},
        {"modules_to_save": ["lm_head"]},
    ),
    ids=("names", "all-linear", "bias", "modules_to_save"),
)
def test_lora_trains_the_parts_that_train(
    place: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    """The tower, whose modules have the same names, stays; the projector trains whole."""
    out = run(
        place, tmp_path / "out", lora={"r": 4, **lora}, stages__0__max_steps=1,
        stages__1__max_steps=3,
    )  # fmt: skip
    moved = changed(weights(out / "stages/align/model"), weights(out))
    assert not [name for name in moved if "vision_tower" in name]
    whole = {name for name in weights(out) if PROJECTOR in name}
    assert whole <= moved
    adapted = {name.split(".")[-2] for name in moved - whole}
    if lora.get("exclude_modules"):
        assert "q_proj" in adapted and "v_proj" not in adapted
    elif "modules_to_save" in lora:
        assert {"lm_head", "q_proj", "down_proj"} <= adapted
    elif lora["target_modules"] == "all-linear":
        assert {"q_proj", "down_proj"} <= adapted
    else:
        assert adapted == {"q_proj", "v_proj"}


def test_lora(place: Path, tmp_path: Path) -> None:
    """Merged at the end."""
    out = run(
        place, tmp_path / "out", lora={"r": 4}, stages__0__max_steps=1, stages__1__max_steps=3,
    )  # fmt: skip
    assert heads(out)
    moved = changed(weights(out / "stages/align/model"), weights(out))
    others = {n for n in moved if "language_model.model.layers" not in n and PROJECTOR not in n}
    assert moved and not others
    assert any(PROJECTOR in n for n in moved)
    assert not (out / "adapter_config.json").exists()
