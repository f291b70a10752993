# SPDX-License-Identifier: Apache-2.0
"""A loss or gradient that is NaN or infinite: the batch is named; the run stops, or goes on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prereg_kernels.train import non_finite as module
from prereg_kernels.train.collator import Collator
from prereg_kernels.train.facts import Facts
from prereg_kernels.train.non_finite import NonFinite, NonFiniteError
from prereg_kernels.train.trainer import RecipeTrainer
from tests.train.places import make_place, metrics
from tests.train.test_run import heads, run, same, weights

BAD = 3  # the step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Where the samples of each batch stand, in the order of the steps."""
    found: list[list[str]] = []
    collate = Collator.__call__

    def record(self: Any, samples: Any) -> Any:
        found.append([sample.where for sample in samples])
        return collate(self, samples)

    monkeypatch.setattr(Collator, "__call__", record)
    return found


def poison(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """In the step of that number: a loss of NaN, or a gradient that is infinite."""
    compute = RecipeTrainer.compute_loss

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    def compute_loss(self: Any, network: nn.Module, *args: Any, **options: Any) -> Any:
        loss = compute(self, network, *args, **options)
        if self.state.global_step != BAD - 1:
            return loss
        return loss * torch.nan if what == "loss" else Infinite.apply(loss)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)


SHORT: dict[str, Any] = {
    "stages": [{"name": "tune", "trainable": ["projector", "llm"], "max_steps": 5}],
    "trainer__save_steps": 1, "trainer__save_total_limit": 9,
}  # fmt: skip


@pytest.mark.parametrize("what", ("loss", "gradient"))
@pytest.mark.parametrize("pre", (None, {"weight": 0.5}))
def test_stop(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: Any, what: str, pre: Any
) -> None:
    """At the next log, or before a checkpoint: none is written of such weights."""
    poison(monkeypatch, what)
    with pytest.raises(NonFiniteError, match=f"the {what} of step {BAD} is not finite; ") as error:
        run(place, tmp_path / "out", pre=pre, trainer__logging_steps=10, **SHORT)
    names = batches[BAD - 1]
    assert all(name in str(error.value) for name in names) and len(names) == 4
    [line] = read(tmp_path / "out/non_finite.jsonl")
    assert line == {"stage": "tune", "step": BAD, "what": what, "where": names}
    saved = sorted((tmp_path / "out/stages/tune").glob("checkpoint-*"))
    assert [path.name for path in saved] == [f"checkpoint-{n}" for n in range(1, BAD)]
    assert all(x.isfinite().all() for x in weights(saved[-1]).values())


@pytest.mark.parametrize("what", ("loss", "gradient"))
def test_skip(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: Any, what: str
) -> None:
    """Weights and heads stay through that step, and no other; the figures stay finite."""
    poison(monkeypatch, what)
    out = run(place, tmp_path / "out", non_finite="skip", trainer__logging_steps=5, **SHORT)
    [line] = read(out / "non_finite.jsonl")
    assert line == {"stage": "tune", "step": BAD, "what": what, "where": batches[BAD - 1]}
    saved = [out / f"stages/tune/checkpoint-{step}" for step in range(1, 6)]
    stayed = [same(weights(a), weights(b)) for a, b in pairwise(saved)]
    assert stayed == [False, True, False, False]
    assert same(heads(saved[1]), heads(saved[2])) and not same(heads(saved[2]), heads(saved[3]))
    [log] = metrics(out, "tune")
    assert log["non_finite_steps"] == 1
    assert all(torch.tensor(log[name]).isfinite() for name in ("loss", "lm_loss", "pre_loss"))


def test_a_finite_run_has_none(place: Path, tmp_path: Path) -> None:
    """With either setting it is the same run, bitwise."""
    stop = run(place, tmp_path / "stop", **SHORT)
    skip = run(place, tmp_path / "skip", non_finite="skip", **SHORT)
    assert same(weights(stop), weights(skip))
    for out in (stop, skip):
        assert (out / "non_finite.jsonl").read_text() == ""
        assert "non_finite_steps" not in metrics(out, "tune")[-1]
    with pytest.raises(ValueError, match=r"non_finite: expected one of .*, got 'ignore'"):
        run(place, tmp_path / "other", non_finite="ignore")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts(name: str, labels: int = 3) -> Facts:
    return Facts((name,), 5, 2, labels, 1, 12)


@pytest.mark.parametrize("what", ("stop", "skip"))
def test_all_ranks_decide_alike(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The loss of the second of two ranks is bad: both say so, by its samples alone."""
    watches, cleared = [], []
    losses = {0: 1.0, 1: torch.inf}
    together: list[Tensor] = []

    def reduce(flags: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        together.append(flags)
        return flags + torch.tensor([[1.0, 0.0]]) * (flags[0, 0] == 0)  # the other's are added

    monkeypatch.setattr(
        module, "gather_object", lambda mine: [*mine, *(["b"] if mine != ["b"] else [])]
    )
    for rank in range(2):
        optimizer = SimpleNamespace(zero_grad=lambda rank=rank: cleared.append(rank))
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(reduce=reduce, scaler=None), optimizer=optimizer,
            is_deepspeed_enabled=False,
        )  # fmt: skip
        watch = NonFinite(trainer, what, None)
        watch.see_loss(torch.tensor(losses[rank]), facts("ab"[rank]))
        watch.see_gradient(torch.tensor(1.0))
        state: Any = SimpleNamespace(global_step=6)
        control: Any = None
        watch.on_pre_optimizer_step(None, state, control)
        if what == "stop":
            with pytest.raises(NonFiniteError, match=r"the loss of step 7 .* its samples: b"):
                watch.judge()
        watches.append(watch)
    assert [watch.count for watch in watches] == [1, 1]
    assert cleared == ([] if what == "stop" else [0, 1])
    assert [flags[0, 0].item() for flags in together] == [0.0, 1.0]


def test_what_is_no_fault() -> None:
    """The mean over no label, and the overflow that a GradScaler waits for."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(reduce=lambda flags, reduction: flags, scaler=object()),
        optimizer=None, is_deepspeed_enabled=False,
    )  # fmt: skip
    watch = NonFinite(trainer, "stop", None)
    assert watch.see_loss(torch.tensor(2.0), facts("a")) == 2.0
    assert watch.see_loss(torch.tensor(torch.nan), facts("b", labels=0)) == 2.0
    watch.see_gradient(torch.tensor(torch.inf))
    state: Any = SimpleNamespace(global_step=0)
    control: Any = None
    watch.on_pre_optimizer_step(None, state, control)
    watch.judge()
    assert watch.count == 0


def test_deepspeed_cannot_skip() -> None:
    with pytest.raises(ValueError, match="non_finite: expected stop under DeepSpeed"):
        NonFinite(SimpleNamespace(is_deepspeed_enabled=True), "skip", None)
