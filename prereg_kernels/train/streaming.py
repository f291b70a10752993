# SPDX-License-Identifier: Apache-2.0
"""What a run trains on as it comes: streams, whose order is a function of the seed and the epoch.

Nothing is known of a stream but what was read. So, other than with data that have an index:

- A stream is shuffled by its shards, and within blocks of `BLOCK` rows. Batches are grouped by
  length and by modality within a block; where a kind fills no batch, its batches are smaller.
- It has no end: each rank and worker goes on with its own next epoch, so that none waits for
  another whose shards hold less. A run needs a number of steps.
- Ranks read other shards and cannot know whose batch has images. On several of them a batch of
  text alone has a hidden image (`Collator`), so that the same parts of the model run on all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets.distributed import split_dataset_by_node
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from prereg_kernels._util.files import printable, write_whole
from prereg_kernels.train.collator import Failed
from prereg_kernels.train.sample import BadSampleError, Sample
from prereg_kernels.train.source import Stream
from prereg_kernels.train.waiting import within

BLOCK = 1000
"""Rows that are shuffled together, as many as the buffer of `datasets` has; they are in memory."""
_Row = tuple[Stream, str, Mapping[str, Any]]  # its stream, its place, and what it holds
_EMPTY = 100  # epochs without a row, after which a rank or worker gives up: shards are dealt anew
_AT_ONCE = 10  # rows that are waited for together
_PLACE = "place"  # a batch's entry: (worker, its state behind the batch)

Group = Callable[
    [NDArray[np.int64], NDArray[np.int64], np.random.Generator], Sequence[Sequence[int]]
]
"""(characters, images, random) of a block's rows to the rows of each batch."""


class _Reader:
    """The rows of a stream, epoch after epoch, as `datasets` gives them to a rank and worker."""

    def __init__(self, stream: Stream, rows: Any, seed: int, state: Mapping[str, Any]) -> None:
        self.stream, self._seed = stream, seed
        self._rows = deepcopy(rows)  # the workers of a data set share its epoch's number
        self._begin(**state)

    def _begin(self, epoch: int, row: int, rows: Any) -> None:
        self._epoch, self._row, self._state, self._has_read = epoch, row, rows, False
        # `datasets` orders the shards by this number, but for 0
        [number] = np.random.SeedSequence([self._seed, epoch]).generate_state(1)
        self._rows.set_epoch(1 + int(number))
        if rows is not None:
            self._rows.load_state_dict(rows)
        self._iterator = iter(self._rows)

    def state(self) -> dict[str, Any]:
        """Where it is, for a _Reader that goes on from here."""
        if self._has_read:
            self._state = self._rows.state_dict()
        return {"epoch": self._epoch, "row": self._row, "rows": self._state}

    def next(self) -> tuple[str, Any] | None:
        """(its place, a row); None: an epoch has ended, and the next begins."""
        row = next(self._iterator, None)
        if row is None:
            self._begin(self._epoch + 1, 0, None)
            return None
        self._has_read, self._row = True, self._row + 1
        return f"row {self._row - 1} of epoch {self._epoch}", row


class StreamBatches(IterableDataset[Any]):
    """The batches of streams on a rank, without end; each worker reads some of the shards.

    Args:
        streams: what they read.
        names: of each stream, for messages.
        weights: of each stream, its share of the samples.
        seed: of the order.
        rank, ranks: which of how many.
        group: forms batches of a block's rows.
        collate: makes a batch of samples.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        names: Sequence[str],
        weights: Sequence[float],
        *,
        seed: int,
        rank: int,
        ranks: int,
        group: Group,
        collate: Callable[[Sequence[Sample | Failed]], dict[str, Any]],
    ) -> None:
        self._streams, self._names = tuple(streams), tuple(names)
        self._weights = np.array(weights)
        self._rows = [
            stream.rows if ranks == 1 else split_dataset_by_node(stream.rows, rank, ranks)
            for stream in self._streams
        ]
        self._seed, self.rank, self.ranks = seed, rank, ranks
        self._group, self._collate = group, collate
        self.shards = min(rows.num_shards for rows in self._rows)
        self.states: dict[int, Any] = {}
        self.next_worker = 0

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        if worker < self.next_worker:  # DataLoader begins with worker 0, wherever it was
            yield None
        count = len(self._rows)
        state = self.states.get(worker) or {
            "block": 0, "batch": 0, "taken": [0] * count,
            "readers": [{"epoch": 0, "row": 0, "rows": None}] * count,
        }  # fmt: skip
        block, done = state["block"], state["batch"]
        readers = [
            _Reader(stream, rows, self._seed, each)
            for stream, rows, each in zip(self._streams, self._rows, state["readers"], strict=True)
        ]
        taken, empty = np.array(state["taken"]), 0
        while True:
            begin = {"readers": [reader.state() for reader in readers], "taken": taken.tolist()}
            rows = self._block(readers, taken, worker)
            empty = 0 if rows else empty + 1
            if empty == _EMPTY:
                return
            shapes = np.array([stream.row_shape(row) for stream, _, row in rows], dtype=np.int64)
            random = np.random.default_rng([self._seed, self.rank, worker, block])
            batches = self._group(shapes[:, 0], shapes[:, 1], random) if rows else []
            for number, batch in enumerate(batches):
                if number >= done:
                    place = {"block": block, "batch": number + 1, **begin}
                    samples = [_sample(*rows[i], bool(shapes[i, 1])) for i in batch]
                    yield {**self._collate(samples), _PLACE: (worker, place)}
            block, done = block + 1, 0

    def _block(
        self, readers: Sequence[_Reader], taken: NDArray[np.int64], worker: int
    ) -> list[_Row]:
        """As `_read`, which may stall: the rows behind could not be read either.

        Raises:
            TimeoutError: a row does not come in time.
        """
        reading = self._read(readers, taken, worker)
        rows: list[_Row] = []
        while True:
            [several] = within([lambda: list(islice(reading, _AT_ONCE))])
            if isinstance(several, TimeoutError):
                names = ", ".join(printable(name) for name in self._names)
                raise TimeoutError(f"data: {names}: {several}")
            if isinstance(several, Exception):
                raise several
            rows += several
            if len(several) < _AT_ONCE:
                return rows

    def _read(
        self, readers: Sequence[_Reader], taken: NDArray[np.int64], worker: int
    ) -> Iterator[_Row]:
        """A block, (stream, place, row): by the streams' weights, until an epoch of one ends."""
        for _ in range(BLOCK):
            which = int(np.argmin((taken + 1) / self._weights))
            found = readers[which].next()
            if found is None:
                return
            taken[which] += 1
            place, row = found
            stream = self._streams[which]
            if (where := stream.row_where(row)) is None:
                where = f"{self._names[which]}: {place}, of rank {self.rank}, worker {worker}"
            yield stream, where, row


def first_samples(stream: Stream) -> Iterator[tuple[Sample, int, int]]:
    """The first that can be used, with their characters and images."""
    for row in islice(stream.rows, 64):
        with suppress(BadSampleError):
            yield stream.row_sample(row), *stream.row_shape(row)


def _sample(
    stream: Stream, where: str, row: Mapping[str, Any], has_images: bool
) -> Sample | Failed:
    try:
        return replace(stream.row_sample(row), where=where)
    except BadSampleError as error:
        return Failed(where, str(error), has_images)


class StreamLoader:
    """What a trainer takes its batches from.

    Args:
        batches: of this rank.
        count: how many a run takes.
        workers: processes; no more are started than there are shards.
        options: of torch's DataLoader.
    """

    def __init__(self, batches: StreamBatches, count: int, workers: int, **options: Any) -> None:
        self.dataset, self._count = batches, count
        self._workers = min(workers, batches.shards)
        if self._workers:
            options = {**options, "num_workers": self._workers}
        else:
            options = {"pin_memory": options.get("pin_memory", False)}
        self._options = options
        self._taken = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.dataset.next_worker = self._taken % max(self._workers, 1)
        loader = DataLoader(self.dataset, batch_size=None, collate_fn=_same, **self._options)
        for batch in loader:
            if batch is not None:
                worker, place = batch.pop(_PLACE)
                self.dataset.states[worker] = place
                self._taken += 1
                yield batch
        raise ValueError(
            f"data: a stream has no samples for rank {self.dataset.rank} of {self.dataset.ranks}"
        )

    def save(self, checkpoint: Path) -> None:
        """Write where this rank is into a checkpoint."""
        state = {
            "ranks": self.dataset.ranks, "workers": self._workers, "taken": self._taken,
            "states": self.dataset.states,
        }  # fmt: skip
        write_whole(self._path(checkpoint), json.dumps(state) + "\n")

    def load(self, checkpoint: Path) -> None:
        """Go on behind the last batch that a checkpoint's run had taken.

        Raises:
            ValueError: that was read by other ranks or workers.
        """
        try:
            state = json.loads(self._path(checkpoint).read_text())
        except FileNotFoundError:
            state = {"ranks": None}
        now = {"ranks": self.dataset.ranks, "workers": self._workers}
        before = {name: state.get(name) for name in now}
        if before != now:
            raise ValueError(
                f"{checkpoint}: its streams were read with {before}; expected the same, got {now}"
            )
        self._taken = state["taken"]
        self.dataset.states = {int(worker): place for worker, place in state["states"].items()}

    def _path(self, checkpoint: Path) -> Path:
        return checkpoint / f"stream_{self.dataset.rank}.json"


def _same(batch: Any) -> Any:
    return batch
