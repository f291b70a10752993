# SPDX-License-Identifier: Apache-2.0
"""Files that are not what they should be, in formats of their own, are bad samples of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import parquet

from prereg_kernels.train.collator import open_image
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sample import BadSampleError
from prereg_kernels.train.sources import open_source
from tests.train.test_collator import bomb
from tests.train.test_sources import LLAVA, MESSAGES, png, write_shard


def test_a_shard_that_is_cut(tmp_path: Path) -> None:
    """In a stream the rest of it is one bad sample, and the shards behind it are read."""
    record = json.dumps(LLAVA[0]).encode()
    several = {str(i): {"json": record, "png": png((i, 0, 0))} for i in range(4)}
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", several)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"3.json") - 700])
    stream = open_source(DataConfig(str(tmp_path), "webdataset", streaming=True))
    good, bad = [], []
    for row in stream.rows:
        try:
            good.append(stream.row_sample(row).where)
        except BadSampleError as error:
            bad.append((stream.row_where(row), str(error)))
    assert [where.split(": ")[1] for where in good if "a.tar" in where] == ["0", "1"]
    assert sum("b.tar" in where for where in good) == 4
    [(where, reason)] = bad
    with pytest.raises(ValueError, match=r"a\.tar: expected an uncompressed \.tar: unexpected end"):
        open_source(DataConfig(str(tmp_path), "webdataset"))
    assert where == f"{tmp_path}/a.tar" and "the rest of the shard cannot be read" in reason


@pytest.mark.parametrize("is_stream", [False, True])
def test_images_of_a_hostile_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    """A Parquet file that names other files, or holds what is no image: none of them is opened."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    (tmp_path / "secret.png").write_bytes(png((9, 9, 9)))
    folder.mkdir()
    (folder / "good.png").write_bytes(png((1, 2, 3)))
    os.mkfifo(folder / "pipe.png")
    images: list[Any] = [
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": "pipe.png"},
        {"bytes": bomb(60_000, 60_000), "path": "x.png"},
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": "good.png"},
        {"bytes": png((4, 5, 6)), "path": "../other.png"},
    ]
    features = datasets.Features(
        messages=[{"role": datasets.Value("string"),
                   "content": [{"type": datasets.Value("string"),
                                "text": datasets.Value("string")}]}],
        images=[datasets.Image()],
    )  # fmt: skip
    rows = [{"messages": MESSAGES[0], "images": [image]} for image in images]
    # By itself `datasets` would open the files to embed them
    table = datasets.Dataset.from_list(rows, features=features).data.table
    parquet.write_table(table, folder / "train.parquet")
    source = open_source(DataConfig(str(folder), streaming=is_stream))
    if is_stream:
        samples = [source.row_sample(row) for row in source.rows]
    else:
        samples = [source[number] for number in range(len(images))]
    reasons, opened = [], []
    for sample in samples:
        try:
            [image] = sample.images
            opened.append(open_image(image, sample.root).getpixel((0, 0)))
        except BadSampleError as error:
            reasons.append(str(error).split(": ", 1)[1])
    out = "a name or a link that leads out of the directory"
    assert reasons[:3] == [out, out, "no file, but a directory or a device"]
    assert "pixels" in reasons[3] and reasons[4] == "damaged, or not an image"
    assert opened == [(1, 2, 3), (4, 5, 6)]
