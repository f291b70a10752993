# SPDX-License-Identifier: Apache-2.0
"""Streams: every row once an epoch, an order that is a function of the seed, resumed in the middle,
split over ranks and workers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from prereg_kernels.train import streaming
from prereg_kernels.train.collator import Failed
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.order import grouped
from prereg_kernels.train.sample import Sample
from prereg_kernels.train.sources import open_source
from prereg_kernels.train.streaming import StreamBatches, StreamLoader

SIZES = (7, 12, 1, 30)  # rows of each shard


def record(name: str, number: int) -> dict[str, Any]:
    """Every third is text alone."""
    asked = "what? " * (number % 5) + ("" if number % 3 == 2 else "<image>")
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "yes"}]
    images = {} if number % 3 == 2 else {"image": f"{name}.png"}
    return {"conversations": turns, **images}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(streaming, "BLOCK", 10)
    write(tmp_path / "a", SIZES)
    write(tmp_path / "b", (5, 3))
    return tmp_path


def write(folder: Path, sizes: Sequence[int]) -> None:
    folder.mkdir()
    for shard, size in enumerate(sizes):
        lines = [json.dumps(record(f"{shard}", number)) for number in range(size)]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")


def names(samples: Sequence[Sample | Failed]) -> dict[str, Any]:
    """A batch that says what it is made of."""
    return {
        "where": [Path(sample.where).name for sample in samples],
        "images": [len(sample.images) for sample in samples if isinstance(sample, Sample)],
    }


def loader(
    *folders: Path, rank: int = 0, ranks: int = 1, workers: int = 0, seed: int = 0, size: int = 3,
    weights: Sequence[float] = (1.0, 1.0),
) -> StreamLoader:  # fmt: skip
    batches = StreamBatches(
        [open_source(DataConfig(str(path), "llava", streaming=True)) for path in folders],
        [path.name for path in folders], weights[: len(folders)], seed=seed, rank=rank, ranks=ranks,
        group=partial(grouped, size=size), collate=names,
    )  # fmt: skip
    return StreamLoader(batches, 100, workers)


def rows(batches: Iterator[Any], count: int) -> list[str]:
    """Of the first batches."""
    return [where for batch in islice(batches, count) for where in batch["where"]]


def until(batches: Iterator[Any], count: int) -> list[str]:
    """Of as many batches as hold so many rows."""
    found: list[str] = []
    while len(found) < count:
        found += next(batches)["where"]
    assert len(found) == count
    return found


EXPECTED = Counter(
    f"{shard}.jsonl:{line}" for shard, size in enumerate(SIZES) for line in range(1, size + 1)
)


def test_an_epoch_has_every_row_once(folder: Path) -> None:
    batches = iter(loader(folder / "a"))
    first, second = (until(batches, sum(SIZES)) for _ in range(2))
    assert Counter(first) == Counter(second) == EXPECTED
    assert first != second and first != sorted(first)
    again = iter(loader(folder / "a"))
    assert until(again, sum(SIZES)) == first
    assert until(iter(loader(folder / "a", seed=1)), sum(SIZES)) != first
    # Shards come in another order in each epoch; within blocks, rows do
    shards = [list(dict.fromkeys(where[0] for where in each)) for each in (first, second)]
    assert shards[0] != shards[1]


def test_batches_are_of_one_kind_and_even(folder: Path) -> None:
    batches = list(islice(iter(loader(folder / "a", size=4)), 30))
    assert all(len({count > 0 for count in batch["images"]}) == 1 for batch in batches)
    assert {len(batch["where"]) for batch in batches} <= {1, 2, 3, 4}
    # 10 rows with 6 or 7 images are 2 batches of 3 or 4, and one of the others
    assert sum(len(batch["where"]) >= 3 for batch in batches) > 20


def test_small_streams_have_small_batches(tmp_path: Path) -> None:
    """Of 13 rows, 9 have images; beside a large stream, blocks end with the small one's epochs."""
    write(tmp_path / "small", (13,))
    write(tmp_path / "large", (1300,))

    def sizes(count: int, *names: str) -> list[int]:
        batches = iter(loader(*(tmp_path / name for name in names), size=8))
        return sorted(len(batch["where"]) for batch in islice(batches, count))

    assert sizes(3, "small") == [4, 4, 5]
    assert sizes(4, "small", "large") == [6, 6, 6, 8]
    alone = sizes(120, "large")  # of the first block's 126
    assert sum(alone) > 120 * 7.8 and max(alone) == 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 7, 26])
def test_resumed_in_the_middle(folder: Path, tmp_path: Path, workers: int, taken: int) -> None:
    """The same batches as without the interruption, in the second epoch too."""
    make = partial(loader, folder / "a", folder / "b", workers=workers)
    whole = [batch["where"] for batch in islice(iter(make()), 40)]
    first = make()
    before = [batch["where"] for batch in islice(iter(first), taken)]
    first.save(tmp_path)
    then = make()
    then.load(tmp_path)
    after = [batch["where"] for batch in islice(iter(then), 40 - taken)]
    assert before + after == whole


def test_a_resume_reads_no_finished_block(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    first = loader(folder / "a")
    whole = [batch["where"] for batch in islice(iter(first), 12)]
    first.save(tmp_path)
    make = streaming._sample
    monkeypatch.setattr(streaming, "_sample", lambda *x: made.append(Path(x[1]).name) or make(*x))
    then = loader(folder / "a")
    then.load(tmp_path)
    following = rows(iter(then), 3)
    assert made == following and not set(made) & {where for each in whole for where in each}


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (2, 2), (3, 0)])
def test_ranks_share_the_rows(folder: Path, ranks: int, workers: int) -> None:
    """Two ranks get two shards each, three every third row. One with few rows goes on with its next
    epoch, so that none ends."""
    of_rank = []
    for rank in range(ranks):
        own = loader(folder / "a", rank=rank, ranks=ranks, workers=workers, size=1)
        assert len(rows(iter(own), 2 * sum(SIZES))) == 2 * sum(SIZES)
        alone = loader(folder / "a", rank=rank, ranks=ranks, size=1)
        of_rank.append(until(iter(alone), _rows_of_an_epoch(alone)))
    assert max(Counter(where for each in of_rank for where in each).values()) == 1
    # In turn, the last round of rows may not reach all ranks
    assert sum(SIZES) - ranks < sum(map(len, of_rank)) <= sum(SIZES)


def _rows_of_an_epoch(of_rank: StreamLoader) -> int:
    [stream], [own] = of_rank.dataset._streams, of_rank.dataset._rows
    reader = streaming._Reader(stream, own, 0, {"epoch": 0, "row": 0, "rows": None})
    return sum(1 for _ in iter(reader.next, None))


@pytest.mark.parametrize("share", [1.0, 3.0])
def test_weights_are_shares(folder: Path, share: float) -> None:
    for folder_of, name in ((folder / "a", "a"), (folder / "b", "b")):  # names of their own
        for path in folder_of.iterdir():
            path.rename(folder_of / f"{name}{path.name}")
    batches = iter(loader(folder / "a", folder / "b", weights=(share, 1.0), size=1))
    first = [where[0] for where in rows_of_one(batches, 800)]
    assert first.count("a") / first.count("b") == pytest.approx(share, rel=0.1)


def rows_of_one(batches: Iterator[Any], count: int) -> list[str]:
    return [next(batches)["where"][0] for _ in range(count)]


def test_other_ranks_cannot_go_on(folder: Path, tmp_path: Path) -> None:
    first = loader(folder / "a")
    next(iter(first))
    first.save(tmp_path)
    with pytest.raises(ValueError, match=r"read with .*'ranks': 1.*got .*'ranks': 2"):
        loader(folder / "a", ranks=2).load(tmp_path)


def test_a_stream_of_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a", (0, 0))
    with pytest.raises(ValueError, match="a stream has no samples for rank 0 of 1"):
        next(iter(loader(tmp_path / "a")))


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_shards_of_a_rank(tmp_path: Path, workers: int) -> None:
    """A rank goes on with its others, and with what it has in the next epoch. So with a single
    shard of two that holds rows, each rank has it in some epochs, and none ends."""
    write(tmp_path / "a", (0, 9, 0, 0, 0, 9, 4, 0))
    write(tmp_path / "b", (9, 0))
    for name, count in (("a", 22), ("b", 9)):
        for rank in range(2):
            batches = loader(tmp_path / name, rank=rank, ranks=2, workers=workers)
            found = Counter(rows(iter(batches), 60))
            assert len(found) == count and min(found.values()) > 1, (name, rank)


def test_a_stalled_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind it cannot be read either: the run ends, and says why."""
    monkeypatch.setattr("prereg_kernels.train.waiting.READ_SECONDS", 0.2)
    batches = loader(folder / "a")
    (folder / "a" / "0.jsonl").unlink()
    os.mkfifo(folder / "a" / "0.jsonl")  # nobody writes to it
    with pytest.raises(TimeoutError, match=r"data: a: no answer within 0\.2 s"):
        until(iter(batches), sum(SIZES))


def test_a_list_cannot_stream(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"streaming: expected \.jsonl files, got .*d\.json"):
        open_source(DataConfig(str(tmp_path / "d.json"), "llava", streaming=True))
