# SPDX-License-Identifier: Apache-2.0
"""The samples of a step are what counts, not how micro-batches and ranks share them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prereg_kernels.train.engines import check_launcher
from prereg_kernels.train.global_batch import BATCH, check_checkpoint, without_batch
from tests.train.places import close, make_place, metrics
from tests.train.test_run import Crash, run, with_callback

SHORT = {"stages__0__max_steps": 1, "stages__1__max_steps": 4}
HALF: dict[str, Any] = {
    "trainer__per_device_train_batch_size": 2, "trainer__gradient_accumulation_steps": 2,
}  # fmt: skip


def test_other_micro_batches_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint of steps of 4, 2 x 2; steps of 2 are refused, and say why."""
    place = make_place(tmp_path / "place")
    whole, out = run(place, tmp_path / "whole", **SHORT), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        with_callback(patch, Crash(3))
        run(place, out, **SHORT)
    written = json.loads((out / f"stages/tune/checkpoint-2/{BATCH}").read_text())
    assert written == {"samples": 4, "ranks": 1, "engine": "DDP"}
    with pytest.raises(ValueError, match=r"is of steps of 4 samples.*got 2 x 1 ranks x 1 grad"):
        run(place, out, **SHORT, trainer__per_device_train_batch_size=2)
    run(place, out, **SHORT, **HALF)
    for ours, expected in zip(metrics(out, "tune"), metrics(whole, "tune"), strict=True):
        for name in ("step", "lm_loss", "pre_loss", "grad_norm"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    close(out / "model.safetensors", whole / "model.safetensors")


def trainer(ranks: int, engine: str) -> Any:
    arguments = SimpleNamespace(
        train_batch_size=8 // ranks, world_size=ranks, gradient_accumulation_steps=1
    )
    return SimpleNamespace(
        args=arguments, is_deepspeed_enabled=engine == "DeepSpeed", is_fsdp_enabled=engine == "FSDP"
    )


@pytest.mark.parametrize(
    ("ranks", "engine", "message"),
    [
        (2, "DDP", "DeepSpeed has written it; expected a start with the same, got DDP"),
        (4, "DeepSpeed", "on as many ranks as wrote them; expected 2, got 4"),
        (2, "DeepSpeed", None),
    ],
)
def test_another_engine(tmp_path: Path, ranks: int, engine: str, message: str | None) -> None:
    written = {"samples": 8, "ranks": 2, "engine": "DeepSpeed"}
    (tmp_path / BATCH).write_text(json.dumps(written))
    if message is None:
        check_checkpoint(tmp_path, trainer(ranks, engine))
    else:
        with pytest.raises(ValueError, match=message):
            check_checkpoint(tmp_path, trainer(ranks, engine))


def test_settings_that_may_change() -> None:
    settings = {"trainer": {"per_device_train_batch_size": 4, "optim": "sgd"}, "stages": [
        {"name": "a", "trainer": {"gradient_accumulation_steps": 2, "max_steps": 3}}
    ]}  # fmt: skip
    assert without_batch(settings) == {
        "trainer": {"optim": "sgd"}, "stages": [{"name": "a", "trainer": {"max_steps": 3}}],
    }  # fmt: skip


def test_restarts_that_would_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launcher()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    check_launcher()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(ValueError, match="--max-restarts: expected TORCH_DISABLE_SHARE_RDZV"):
        check_launcher()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_launcher()
