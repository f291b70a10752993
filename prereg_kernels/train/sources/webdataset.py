# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards: tar files with x.json and x.jpg, or x.0.jpg and x.1.jpg, for each sample.

x.json is a record of LLaVA's format or of TRL's messages. Image paths in it are not read.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from prereg_kernels._util.files import printable
from prereg_kernels.checkup.images.reading import IMAGE_SUFFIXES
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sample import BadSampleError, Sample, check_messages
from prereg_kernels.train.source import parse_record
from prereg_kernels.train.sources.llava import messages_of

_NO_JSON = "expected a .json file"
_TWICE = "expected one .{} file, got another one"
_APART = "expected a sample's files next to each other, got more of it later in its shard"
_Place = tuple[int, int]  # a file's first byte in its shard, and its bytes


class WebDatasetSource:
    """The samples of shards, which are not compressed: a .tar file, or a folder of them.

    Memory holds the places of their files in the shards. With `streaming` it is a Stream, and reads
    each shard from its beginning to its end.

    Raises:
        ValueError: there are none, one is no tar file, or a sample has no JSON or a file twice.
    """

    def __init__(self, data: DataConfig) -> None:
        path = Path(data.path)
        self._shards = files_of(data)
        if not self._shards:
            raise ValueError(f"{printable(path)}: expected .tar files, got none")
        self.rows: Any = None
        if data.streaming:
            from datasets import IterableDataset

            # The library's own reader wants as many images in each sample
            names = {"shards": [str(shard) for shard in self._shards]}
            self.rows = IterableDataset.from_generator(_stream, gen_kwargs=names)
        else:
            self._index()

    def _index(self) -> None:
        self._samples: list[tuple[int, str, _Place, tuple[_Place, ...]]] = []
        lengths, images = [], []
        for shard, file in enumerate(self._shards):
            for key, parts in _members(file).items():
                if "json" not in parts:
                    raise ValueError(f"{printable(file)}: {printable(key)}: {_NO_JSON}")
                places = tuple(parts[name] for name in _pictures(parts))
                self._samples.append((shard, key, parts["json"], places))
                lengths.append(parts["json"][1])
                images.append(len(places))
        self.lengths = np.array(lengths, dtype=np.int64)
        self.images = np.array(images, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def where(self, number: int) -> str:
        """The shard and the key of a sample."""
        shard, key, *_ = self._samples[number]
        return f"{printable(self._shards[shard])}: {printable(key)}"

    def __getitem__(self, number: int) -> Sample:
        """A sample. Raises BadSampleError where it cannot be used."""
        shard, _, place, places = self._samples[number]
        with self._shards[shard].open("rb") as file:

            def read(place: _Place) -> bytes:
                file.seek(place[0])
                return file.read(place[1])

            content, images = read(place), [read(each) for each in places]
        return _sample(self.where(number), content, images)

    def row_shape(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """(bytes of JSON, images)."""
        return len(row["content"] or b""), len(row["images"])

    def row_sample(self, row: Mapping[str, Any]) -> Sample:
        """A sample. Raises BadSampleError where it cannot be used."""
        if row["content"] is None:
            raise BadSampleError(row["reason"])
        return _sample(row["where"], row["content"], row["images"])

    def row_where(self, row: Mapping[str, Any]) -> str | None:
        """The shard and the key of a sample."""
        where: str = row["where"]
        return where


def _sample(where: str, content: bytes, images: Sequence[bytes]) -> Sample:
    record = parse_record(content)
    messages: Any = record.get("messages")
    if messages is None:
        messages = messages_of(record)
    return Sample(where, check_messages(messages, len(images)), images)


def _pictures(parts: Iterable[str]) -> list[str]:
    """Of the extensions of a sample, those of its images, in their order: 2.jpg before 10.jpg."""
    pictures = (part for part in parts if _is_read(part) and part != "json")
    return sorted(pictures, key=lambda part: (re.sub("[0-9]+", _padded, part), part))


def _is_read(extension: str) -> bool:
    return extension == "json" or f".{extension}".endswith(IMAGE_SUFFIXES)


def _padded(number: re.Match[str]) -> str:
    return number[0].zfill(20)


def _stream(shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        name, seen = printable(shard), set[str]()
        try:
            with tarfile.open(shard, "r:") as tar:
                for key, group in groupby(_named(tar), key=lambda each: each[0]):
                    where = f"{name}: {printable(key)}"
                    try:
                        if key in seen:
                            raise BadSampleError(_APART)
                        seen.add(key)
                        parts = _read(tar, group)
                    except BadSampleError as error:
                        yield _bad(where, str(error))
                        continue
                    images = [parts[part] for part in _pictures(parts)]
                    yield {"where": where, "content": parts["json"], "images": images, "reason": ""}
        except (tarfile.TarError, EOFError) as error:  # the shards behind it are read
            yield _bad(name, f"the rest of the shard cannot be read: {error}")


def _bad(where: str, reason: str) -> dict[str, Any]:
    return {"where": where, "content": None, "images": [], "reason": reason}


def _read(
    tar: tarfile.TarFile, group: Iterable[tuple[str, str, tarfile.TarInfo]]
) -> dict[str, bytes]:
    """{extension: content} of a sample. Raises BadSampleError where that is no sample."""
    parts: dict[str, bytes] = {}
    for _, extension, member in group:
        if extension in parts and _is_read(extension):
            raise BadSampleError(_TWICE.format(extension))
        parts[extension] = _content(tar, member)
    if "json" not in parts:
        raise BadSampleError(_NO_JSON)
    return parts


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # `_named` gives files alone
    return file.read()


def _named(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, member) of each file: its extension begins at the first dot of its last
    part."""
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.isreg() and key:
            yield (f"{folder}/{key}" if folder else key), extension.lower(), member
    # tarfile takes half a header for the end
    if Path(str(tar.name)).stat().st_size % tarfile.BLOCKSIZE:
        raise tarfile.ReadError("unexpected end of data")


def _members(path: Path) -> dict[str, dict[str, _Place]]:
    """{key: {extension: its place}}.

    Raises:
        ValueError: it is no tar file, compressed, or has a file twice.
    """
    samples: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for key, extension, member in _named(tar):
                parts = samples.setdefault(key, {})
                if extension in parts and _is_read(extension):
                    raise ValueError(
                        f"{printable(path)}: {printable(key)}: {_TWICE.format(extension)}"
                    )
                parts[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{printable(path)}: expected an uncompressed .tar: {error}") from None
    return samples


def open_source(data: DataConfig) -> WebDatasetSource:
    """The samples of a data set."""
    return WebDatasetSource(data)


def files_of(data: DataConfig) -> list[Path]:
    """The shards that it reads."""
    path = Path(data.path)
    return [path] if path.is_file() else sorted(path.glob("*.tar"))
