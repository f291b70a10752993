# SPDX-License-Identifier: Apache-2.0
"""Source, what a format gives; and records of JSON files, which stay on the disk."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prereg_kernels._util.files import printable
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sample import BadSampleError, Sample

_PIECE = 1 << 20  # characters that are read at a time
_LARGEST = 1 << 26  # characters of a record
_BLANK = re.compile(r"[ \t\r\n,]*")


class Source(Protocol):
    """Samples by their number.

    Attributes:
        lengths: (count,) characters of each sample's text.
        images: (count,) how many images each has. Both are estimates: batches are grouped by them.
    """

    lengths: NDArray[np.int64]
    images: NDArray[np.int64]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sample:
        """A sample. Raises BadSampleError where it cannot be used."""

    def where(self, number: int) -> str:
        """Where it stands: the file and line, or the data set and row."""


class Stream(Protocol):
    """Samples one after the other.

    Attributes:
        rows: a `datasets.IterableDataset`, whose shards are given to ranks and workers.
    """

    rows: Any

    def row_shape(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """(characters of text, images) of a row: estimates. Batches are grouped by them."""

    def row_sample(self, row: Mapping[str, Any]) -> Sample:
        """The sample of a row. Raises BadSampleError where it cannot be used."""

    def row_where(self, row: Mapping[str, Any]) -> str | None:
        """Where it stands; None: it does not say."""


class JsonSource(ABC):
    """The records of a JSON file (a list) or of JSONL files (a record a line).

    Of each record its place in the file is kept, so that 665,000 of them take 20 MB, and a worker
    process opens the file for itself. With `streaming` it is a Stream of JSONL files, and keeps
    nothing.

    Args:
        data: its path is a file, or a folder of .json and .jsonl files.

    Raises:
        ValueError: no such file, a JSON file that holds no samples, or one that is to stream.
        OSError: it cannot be read.
    """

    def __init__(self, data: DataConfig) -> None:
        path = Path(data.path)
        self._files = json_files(path)
        self.root = Path(data.images) if data.images is not None else self._files[0].parent
        if not self.root.is_dir():
            raise ValueError(f"images: expected a folder, got {printable(self.root)}")
        self.rows: Any = None
        if data.streaming:
            self.rows = _stream(self._files)
        else:
            self._index(path)

    def _index(self, path: Path) -> None:
        places: list[tuple[int, int, int, int]] = []
        lengths, images = [], []
        self._firsts = []  # of each file: the number of its first sample
        for number, file in enumerate(self._files):
            self._firsts.append(len(places))
            objects = 0
            for line, start, size, record in read_records(file):
                places.append((number, line, start, size))
                is_object = isinstance(record, dict)
                length, count = self.shape(record) if is_object else (0, 0)
                objects += is_object
                lengths.append(length)
                images.append(count)
            if self._firsts[-1] < len(places) and not objects:
                raise ValueError(
                    f"{printable(file)}: expected a list of samples, or one on each line; no line "
                    "is an object of JSON"
                )
        if not places:
            raise ValueError(f"{printable(path)}: expected samples, got none")
        self._places = np.array(places, dtype=np.int64)
        self.lengths = np.array(lengths, dtype=np.int64)
        self.images = np.array(images, dtype=np.int64)
        if len(places) == 1:  # it may hold the list, as {"data": [...]} does
            try:
                self[0]
            except BadSampleError as error:
                raise ValueError(
                    f"{self.where(0)}: expected a list of samples, or one on each line; got one "
                    f"that cannot be used: {error}"
                ) from None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Sample:
        """A sample. Raises BadSampleError where it cannot be used."""
        file, _, start, size = (int(x) for x in self._places[number])
        with self._files[file].open("rb") as opened:
            opened.seek(start)
            content = opened.read(size)
        return self.sample(parse_record(content), self.where(number))

    def where(self, number: int) -> str:
        """The file and line of a sample; in a list, its number there too."""
        file, line = (int(x) for x in self._places[number, :2])
        path = self._files[file]
        place = f"{printable(path)}:{line}"
        if path.suffix == ".jsonl":
            return place
        return f"{place}[{number - self._firsts[file]}]"

    def row_shape(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """(characters of text, images) of a line."""
        try:
            return self.shape(parse_record(row["content"]))
        except BadSampleError:
            return 0, 0

    def row_sample(self, row: Mapping[str, Any]) -> Sample:
        """The sample of a line. Raises BadSampleError where it cannot be used."""
        return self.sample(parse_record(row["content"]), row["where"])

    def row_where(self, row: Mapping[str, Any]) -> str | None:
        """The file and line."""
        where: str = row["where"]
        return where

    @abstractmethod
    def shape(self, record: dict[str, Any]) -> tuple[int, int]:
        """(characters of text, images) of a record, which may be of any form."""

    @abstractmethod
    def sample(self, record: dict[str, Any], where: str) -> Sample:
        """The sample of a record. Raises BadSampleError where it is none."""


def parse_record(content: bytes) -> dict[str, Any]:
    """An object of JSON. Raises BadSampleError where it is none."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise BadSampleError("not valid JSON") from None
    if not isinstance(record, dict):
        raise BadSampleError(f"expected an object, got a {type(record).__name__}")
    return record


def _stream(files: Sequence[Path]) -> Any:
    # By this generator, not by the library's reader of JSON: that names neither file nor line, and
    # ends at the first line that is not like those before it.
    from datasets import IterableDataset

    for path in files:
        if path.suffix != ".jsonl":
            raise ValueError(f"streaming: expected .jsonl files, got {printable(path)}")
    return IterableDataset.from_generator(
        _stream_lines, gen_kwargs={"files": list(map(str, files))}
    )


def _stream_lines(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path in files:
        with open(path, "rb") as file:
            for line, content in enumerate(file, 1):
                if content.strip():
                    yield {"where": f"{printable(path)}:{line}", "content": content}


def json_files(path: Path) -> list[Path]:
    """The file, or the folder's .json and .jsonl files. Raises ValueError where there are none."""
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(x for x in path.iterdir() if x.suffix in (".json", ".jsonl"))
        if found:
            return found
        raise ValueError(f"{printable(path)}: expected .json or .jsonl files, got none")
    raise ValueError(f"{printable(path)}: expected a file or a folder, got none")


def read_records(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    """(line, first byte, bytes, record) of each record; the record of bad JSON is None.

    A list is read piece by piece: a file of 1 GB takes a few MB.

    Raises:
        ValueError: a .json file that is no list, or ends within one.
    """
    with path.open("rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if path.suffix == ".jsonl" or not start.startswith(b"["):
        if path.suffix == ".json":
            _check_lines(path, start)
        yield from _lines(path)
    else:
        yield from _list(path)


def _check_lines(path: Path, start: bytes) -> None:
    """Raise ValueError unless a .json file has an object on its first line, and so on each."""
    if not start.startswith(b"{"):
        raise ValueError(f"{printable(path)}: expected a list of samples")
    _, _, _, first = next(_lines(path))
    if not isinstance(first, dict):
        raise ValueError(
            f"{printable(path)}: expected a list of samples, or one on each line; got an object "
            "over several lines"
        )


def _lines(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    place = 0
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            if content.strip():
                try:
                    record = json.loads(content)
                except (ValueError, RecursionError):
                    record = None
                yield line, place, len(content), record
            place += len(content)


def _list(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    """The items of a JSON list: a window of the file moves over them.

    Raises:
        ValueError: bad JSON, whose line it names, or no end.
    """
    decode = json.JSONDecoder().raw_decode
    # One character a byte, so that places in the text are places in the file. JSON's own signs are
    # ASCII: where an item ends is the same.
    with path.open(encoding="latin-1", newline="") as file:
        window = _Window(file)
        window.skip(1 + window.text.index("["))
        while True:
            window.skip_blank()
            if window.text[window.at] == "]":
                return
            try:
                record, end = decode(window.text, window.at)
                is_cut = end == len(window.text)  # a number may go on
                reason = "it ends within a list"
            except RecursionError:
                raise ValueError(f"{printable(path)}:{window.line}: nested too deeply") from None
            except json.JSONDecodeError as error:
                is_cut, reason = len(window.text) - window.at < _LARGEST, error.msg
            if is_cut:
                if not window.read():
                    raise ValueError(f"{printable(path)}:{window.line}: not valid JSON: {reason}")
                continue
            yield window.line, window.start + window.at, end - window.at, record
            window.skip(end - window.at)


class _Window:
    """A part of a file's text.

    Attributes:
        text: the part. at: where one is in it. start: of the text, in the file. line: of `at`.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.text, self.at, self.start, self.line = "", 0, 0, 1
        self.read()

    def read(self) -> bool:
        """Go on in the file, and leave what was read behind; False at the end of it."""
        piece = self._file.read(max(_PIECE, len(self.text) - self.at))
        self.start += self.at
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def skip(self, count: int) -> None:
        """Go on in the text."""
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def skip_blank(self) -> None:
        """Go on to the next item, or to the end of the list."""
        while True:
            found = _BLANK.match(self.text, self.at)
            assert found is not None
            self.skip(found.end() - self.at)
            if self.at < len(self.text):
                return
            if not self.read():
                raise ValueError(
                    f"{printable(self._file.name)}:{self.line}: expected ], got its end"
                )
