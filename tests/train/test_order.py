# SPDX-License-Identifier: Apache-2.0
"""The order: a pure function of seed and epoch, in units of one kind and of like lengths."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prereg_kernels.train.collator import Collator, Failed
from prereg_kernels.train.config import load_config
from prereg_kernels.train.order import GroupedSampler, Mixture
from prereg_kernels.train.run import train
from prereg_kernels.train.sample import BadSampleError, Sample
from tests.train.places import make_place, settings, write


class Numbers:
    """Samples that name themselves; every third has no image."""

    def __init__(self, name: str, count: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.name = name
        self.lengths = random.integers(1, 500, count)
        self.images = np.where(np.arange(count) % 3 == 2, 0, random.integers(1, 4, count))

    def __len__(self) -> int:
        return len(self.lengths)

    def where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def __getitem__(self, number: int) -> Sample:
        if number == 5:
            raise BadSampleError("a five")
        return Sample(self.where(number), ())


def sampler(unit: int = 4, weights: Any = (1.0, 1.0), seed: int = 0) -> GroupedSampler:
    mixture = Mixture([Numbers("a", 61), Numbers("b", 100, 1)])
    return GroupedSampler(mixture, weights, unit, seed)


def test_samples_of_several_sources() -> None:
    mixture = Mixture([Numbers("a", 61), Numbers("b", 100, 1)])
    assert len(mixture) == 161
    where = [x.where for x in (mixture[i] for i in range(161))]
    assert where == [f"a:{i}" for i in range(61)] + [f"b:{i}" for i in range(100)]
    assert mixture[5] == Failed("a:5", "a five") and mixture[66] == Failed("b:5", "a five")


def test_a_stalled_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that is not read in time is a bad sample with its place."""
    monkeypatch.setattr("prereg_kernels.train.waiting.READ_SECONDS", 0.2)
    pipe = tmp_path / "pipe"  # nobody writes to it
    os.mkfifo(pipe)

    class Stalled(Numbers):
        def __getitem__(self, number: int) -> Sample:
            return super().__getitem__(number) if number else Sample(pipe.read_text(), ())

    mixture = Mixture([Stalled("a", 61)])
    assert mixture[0] == Failed("a:0", "no answer within 0.2 s", True)
    assert mixture[1] == Sample("a:1", ())


def test_every_sample_once() -> None:
    """But for those that fill the last unit of either kind."""
    order = sampler().order(0)
    images = sampler()._mixture.images
    counts = Counter(order.tolist())
    assert set(counts) == set(range(161))
    for kind in (images > 0, images == 0):
        extra = sum(counts[i] - 1 for i in np.flatnonzero(kind))
        assert extra == -int(kind.sum()) % 4


def test_a_kind_that_fills_no_unit_is_told_of() -> None:
    assert sampler(4).repeated() == {}
    assert sampler(60).repeated() == {"of text alone": 53}
    assert sampler(200).repeated() == {"with images": 108, "of text alone": 53}


def test_units_are_of_one_kind_and_of_like_lengths() -> None:
    order, mixture = sampler().order(3), sampler()._mixture
    units = order.reshape(-1, 4)
    kinds = mixture.images[units] > 0
    assert (kinds.all(axis=1) | ~kinds.any(axis=1)).all()
    spread = np.ptp(mixture.lengths[units], axis=1).mean()
    shuffled = np.random.default_rng(0).permutation(order).reshape(-1, 4)
    assert spread < np.ptp(mixture.lengths[shuffled], axis=1).mean() / 5
    firsts = mixture.lengths[units[:, 0]]
    assert (np.diff(firsts) < 0).mean() > 0.3  # units themselves are not sorted


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    first = sampler()
    assert list(first) == first.order(0).tolist()
    first.set_epoch(2)
    assert list(first) == sampler().order(2).tolist()
    assert sampler().order(0).tolist() != sampler().order(1).tolist()
    assert sampler().order(0).tolist() != sampler(seed=1).order(0).tolist()
    assert {len(sampler().order(epoch)) for epoch in range(5)} == {len(sampler())}


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.5])
def test_weights(weight: float) -> None:
    """Of each source so many, each kind in its own share; fractions drawn anew each epoch."""
    epochs = [Counter(sampler(1, (weight, 1.0)).order(epoch).tolist()) for epoch in range(2)]
    images = sampler()._mixture.images
    for counts in epochs:
        for kind in (images[:61] > 0, images[:61] == 0):
            drawn = sum(counts[i] for i in np.flatnonzero(kind))
            assert drawn == round(weight * int(kind.sum()))
        assert all(counts[i] in (int(weight), int(weight) + 1) for i in range(61))
        assert all(counts[i] == 1 for i in range(61, 161))
    assert (epochs[0] == epochs[1]) == (weight == 1.0)


@pytest.mark.parametrize("kind", ["order", "rows", "stream"])
def test_the_seed_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """`data_seed` decides on the order; where it is not given, `seed` does."""
    place = make_place(tmp_path / "place")
    records = json.loads((place / "data.json").read_text())
    (place / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    stage = {"name": "tune", "trainable": ["projector"], "max_steps": 3}
    changes: dict[str, Any] = {"stages": [stage], "max_length": 100}
    if kind == "rows":
        changes["packing_length"] = 120
    if kind == "stream":
        changes |= {"data__0__path": str(place / "d.jsonl"), "data__0__streaming": True}
    taken: list[Any] = []
    collate = Collator.__call__

    def record(self: Any, samples: Any) -> dict[str, Any]:
        batch = collate(self, samples)
        taken.append(batch["input_ids"].tolist())
        return batch

    monkeypatch.setattr(Collator, "__call__", record)

    def run(name: str, **seeds: int) -> list[Any]:
        taken.clear()
        given = {f"trainer__{key}": seed for key, seed in seeds.items()}
        values = settings(place, tmp_path / name, **changes, **given)
        train(load_config(write(tmp_path / f"{name}.yaml", values)))
        return list(taken)

    by_0, by_8 = run("0", seed=0), run("8", seed=8)
    assert by_0 == run("given", seed=8, data_seed=0) != by_8
