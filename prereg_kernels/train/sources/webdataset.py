"""WebDataset shards: tar files with x.json and x.jpg, or x.0.jpg and x.1.jpg, for each sample.

x.json is a record of LLaVA's format or of TRL's messages. Image paths in it are not read.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from prereg_kernels._util.files import printable
from prereg_kernels.checkup.images.reading import IMAGE_SUFFIXES
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sample import BadSampleError, Sample, check_messages
from prereg_kernels.train.sources.llava import messages_of

_Place = tuple[int, int]  # a file's first byte in its shard, and its bytes


class WebDatasetSource:
    """The samples of shards, which are not compressed: a .tar file, or a folder of them.

    Memory holds the places of their files in the shards.

    Raises:
        ValueError: there are none, one is no tar file, or a sample has no JSON.
    """

    def __init__(self, data: DataConfig) -> None:
        path = Path(data.path)
        self._shards = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not self._shards:
            raise ValueError(f"{printable(path)}: expected .tar files, got none")
        self._samples: list[tuple[int, str, _Place, tuple[_Place, ...]]] = []
        lengths, images = [], []
        for shard, file in enumerate(self._shards):
            for key, parts in _members(file).items():
                if "json" not in parts:
                    raise ValueError(f"{printable(file)}: {printable(key)}: expected a .json file")
                pictures = sorted(part for part in parts if f".{part}".endswith(IMAGE_SUFFIXES))
                places = tuple(parts[name] for name in pictures)
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
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            raise BadSampleError("not valid JSON") from None
        if not isinstance(record, dict):
            raise BadSampleError(f"expected an object, got a {type(record).__name__}")
        messages: Any = record.get("messages")
        if messages is None:
            messages = messages_of(record)
        return Sample(self.where(number), check_messages(messages, len(images)), images)


def _members(path: Path) -> dict[str, dict[str, _Place]]:
    """{key: {extension: its place}}: a name's extension begins at the first dot of its last part.

    Raises:
        ValueError: it is no tar file, or compressed.
    """
    samples: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                if member.isfile() and key:
                    place = (member.offset_data, member.size)
                    samples.setdefault(f"{folder}/{key}" if folder else key, {})[
                        extension.lower()
                    ] = place
    except tarfile.TarError as error:
        raise ValueError(f"{printable(path)}: expected an uncompressed .tar: {error}") from None
    return samples


def open_source(data: DataConfig) -> WebDatasetSource:
    """The samples of a data set."""
    return WebDatasetSource(data)
