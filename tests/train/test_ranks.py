# SPDX-License-Identifier: Apache-2.0
"""Ranks that fail, that are started again, and that another number of them goes on from."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prereg_kernels.train.config import load_config
from prereg_kernels.train.order import GroupedSampler, Mixture
from prereg_kernels.train.sources import open_source
from tests.train.launching import RANK, environment, faulty, start, torchrun
from tests.train.places import close, make_place, metrics, settings, write

pytestmark = pytest.mark.ranks
HALF = {"trainer__per_device_train_batch_size": 2}
STEPS = 7
"""Of the second stage: 18 samples with images and 6 without, in steps of 4."""
CHECKPOINT = {
    "batch.json", "config.json", "model.safetensors", "optimizer.pt", "pre/pre_heads.safetensors",
    "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def launch(
    place: Path, out: Path, faults: list[str], *options: str, ranks: int = 2, **changes: Any
) -> subprocess.CompletedProcess[str]:
    """A run, of one stage before; something may befall it."""
    changes = {"stages__0__max_steps": 1} | ({} if ranks == 1 else HALF) | changes
    path = write(out.with_suffix(".yaml"), settings(place, out, **changes))
    return start(
        *torchrun(ranks, *options, module=RANK),
        "train",
        str(path),
        cwd=out.parent,
        timeout=580,
        **faulty(out.parent, faults or ["0 none none"]),
    )


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, which nothing befalls."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = launch(place, out, [])
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def same(a: Path, b: Path) -> None:
    """Bitwise, with the figures of each step."""
    for name in ("model.safetensors", "pre/pre_heads.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        assert all(x.equal(theirs[key]) for key, x in ours.items()), name
    assert curve(a) == curve(b)


def curve(out: Path) -> list[tuple[Any, ...]]:
    names = ("step", "lm_loss", "pre_loss", "grad_norm")
    return [tuple(line[name] for name in names) for line in metrics(out, "tune")]


def read(folder: Path) -> list[int]:
    """The samples that all ranks have read."""
    files = (folder / "markers").glob("READ-*")
    return sorted(int(line) for file in files for line in file.read_text().split())


def test_killed_at_any_moment(place: Path, whole: Path, tmp_path: Path) -> None:
    """Started again each time; whatever checkpoint is found is whole, and the end is the same."""
    faults = [
        "0 kill model-2", "1 kill random-2", "0 kill flush-2", "0 kill flushed-2",
        "1 kill saved-2", "0 kill step-5",
    ]  # fmt: skip
    done = launch(place, tmp_path / "out", faults, f"--max-restarts={len(faults)}")
    assert done.returncode == 0, done.stderr[-4000:]
    same(tmp_path / "out", whole)
    starts = sorted((tmp_path / "markers").glob("START-*"), key=lambda x: int(x.name[6:]))
    found = [json.loads(path.read_text()) for path in starts]
    assert [sorted(x) for x in found] == [
        [], [], [], [], [], ["checkpoint-2"], ["checkpoint-2", "checkpoint-4"],
    ]  # fmt: skip
    for checkpoints in found:
        for names in checkpoints.values():
            assert set(names) >= CHECKPOINT


REASONS = {
    "1 kill step-3": "Signal 9 (SIGKILL)",
    "1 value step-3": "prereg: a bad sample",
    "1 memory step-3": "RuntimeError: CUDA out of memory",
    "1 disk random-4": "prereg: [Errno 28] No space left on device",
    "0 disk model-4": "prereg: [Errno 28] No space left on device",
}


@pytest.mark.parametrize("fault", REASONS)
def test_one_ends_all(place: Path, whole: Path, tmp_path: Path, fault: str) -> None:
    """Within a minute, with its reason; the checkpoint before stays, and is gone on from."""
    done = launch(place, tmp_path / "out", [fault])
    took = time.time() - (tmp_path / "markers" / fault).stat().st_mtime
    assert done.returncode != 0 and took < 60
    assert REASONS[fault] in done.stderr
    assert [x.name for x in (tmp_path / "out/stages/tune").glob("checkpoint-*")] == ["checkpoint-2"]
    if "disk" in fault:
        done = launch(place, tmp_path / "out", [fault])
        assert done.returncode == 0, done.stderr[-4000:]
        same(tmp_path / "out", whole)


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_a_loss_that_is_not_finite(place: Path, tmp_path: Path, what: str) -> None:
    """Of one rank: both stop, or both leave the step out, and the file names its samples."""
    out = tmp_path / "out"
    steps = {"trainer__logging_steps": 2, "trainer__save_steps": 1}
    done = launch(place, out, ["1 nan step-2"], non_finite=what, **steps)
    config = load_config(out.with_suffix(".yaml"))
    mixture = Mixture([open_source(config.data[0])])
    order = GroupedSampler(mixture, [1.0], 4, 42).order(0)
    of_rank = [mixture[int(number)].where for number in order[2 * 4 + 2 : 3 * 4]]
    [line] = [json.loads(x) for x in (out / "non_finite.jsonl").read_text().splitlines()]
    assert line == {"stage": "tune", "step": 3, "what": "loss", "where": of_rank}
    if what == "stop":
        assert done.returncode != 0
        assert done.stderr.count("non_finite: the loss of step 3 is not finite") == 2
        saved = {x.name for x in (out / "stages/tune").glob("checkpoint-*")}
        assert saved == {"checkpoint-1", "checkpoint-2"}
        return
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(x.isfinite().all() for x in load_file(out / "model.safetensors").values())
    assert metrics(out, "tune")[-1]["non_finite_steps"] == 1


def test_sigterm_to_one(place: Path, whole: Path, tmp_path: Path) -> None:
    """All save at the same step, and stop."""
    fault = "1 term step-3"
    done = launch(place, tmp_path / "out", [fault])
    assert done.returncode != 0
    assert done.stderr.count("prereg: stopped at step 4 of tune") == 2
    assert (tmp_path / "out/stages/tune/checkpoint-4").is_dir()
    assert launch(place, tmp_path / "out", [fault]).returncode == 0
    same(tmp_path / "out", whole)


def test_sigterm_to_torchrun(place: Path, tmp_path: Path) -> None:
    """As Kubernetes sends it to the first process of a container."""
    path = write(tmp_path / "out.yaml", settings(
        place, tmp_path / "out", stages__1__max_steps=5000, trainer__save_steps=4999, **HALF
    ))  # fmt: skip
    process = subprocess.Popen(
        [*torchrun(2, "--shutdown-timeout=120"), "train", str(path)], cwd=tmp_path,
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not metrics_are_there(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert "prereg: stopped at step" in said
    [checkpoint] = (tmp_path / "out/stages/tune").glob("checkpoint-*")
    assert {str(x.relative_to(checkpoint)) for x in checkpoint.rglob("*")} >= CHECKPOINT


def metrics_are_there(out: Path) -> bool:
    return (out / "metrics.jsonl").exists() and len(metrics(out, "tune")) > 3


@pytest.mark.parametrize("ranks", [2, 1])
def test_another_number_goes_on(place: Path, whole: Path, tmp_path: Path, ranks: int) -> None:
    """Each sample once, the same losses and weights; other samples in a step are refused."""
    out, others = tmp_path / "out", 3 - ranks
    failed = launch(place, out, [f"{ranks - 1} kill step-5"], ranks=ranks)
    assert "SIGKILL" in failed.stderr
    for path in (tmp_path / "markers").glob("READ-*"):
        path.unlink()
    size = {"trainer__per_device_train_batch_size": 2 if ranks == 2 else 4}
    refused = launch(place, out, [], ranks=others, **size)
    assert refused.returncode != 0
    assert "checkpoint-4 is of steps of 4 samples" in refused.stderr
    shared = {"trainer__gradient_accumulation_steps": 2} if others == 1 else {}
    done = launch(place, out, [], ranks=others, **shared, **HALF)
    assert done.returncode == 0, done.stderr[-4000:]
    config = load_config(out.with_suffix(".yaml"))
    order = GroupedSampler(Mixture([open_source(config.data[0])]), [1.0], 4, 42).order(0)
    assert read(tmp_path) == sorted(order[4 * 4 :].tolist())
    for ours, theirs in zip(curve(out), curve(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    close(out / "model.safetensors", whole / "model.safetensors")
    close(out / "pre/pre_heads.safetensors", whole / "pre/pre_heads.safetensors")
