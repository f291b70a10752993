# SPDX-License-Identifier: Apache-2.0
"""Paths that are not there are told from names on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from prereg_kernels.train.assemble import assemble
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.evaluate import Respondent
from prereg_kernels.train.models import model_on_meta
from prereg_kernels.train.names import check_name
from prereg_kernels.train.sources import open_source

PATHS = ("./mine", "/nowhere/mine", "../mine", "~/mine", "a/b/c", "mine/", "a/b/*", "./mine[1]")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def ask(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download._get_metadata_or_catch_error", ask)
    monkeypatch.setattr("datasets.load_dataset", ask)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_not_there(tmp_path: Path, name: str) -> None:
    """An error at once, whoever was to read it."""
    message = ": expected a file or a folder that is there, or a name on the hub, got "
    message += re.escape(name) + "$"
    with pytest.raises(ValueError, match="model" + message):
        model_on_meta(name)
    with pytest.raises(ValueError, match="model" + message):
        Respondent(name)
    with pytest.raises(ValueError, match="data" + message):
        open_source(DataConfig(name))
    with pytest.raises(ValueError, match="--vision" + message):
        assemble(name, "llm", tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["org/name", "here/name", "name", "here", "here/model", "./here", "here/"]
)
def test_what_may_be_there(name: str) -> None:
    check_name("model", name)


@pytest.mark.parametrize(
    "name",
    ["/nowhere/train-*.parquet", "./a/b/*.parquet", "a/b/pq/train-?.parquet", "a/b/[01].parquet",
     "file:///nowhere/0.parquet", "https://host/a/0.parquet", "s3://bucket/a/0.parquet",
     "hf://datasets/org/name", "hf://datasets/org/name/data/*.parquet"],
)  # fmt: skip
def test_globs_and_urls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` looks for data, as it can; a model is none of them."""
    asked: list[Any] = []

    def load(**kwargs: Any) -> Any:
        asked.append(kwargs.get("data_files", kwargs["path"]))
        raise FileNotFoundError("looked for")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ValueError, match=r": looked for$"):
        open_source(DataConfig(name))
    assert asked == [{"train": name} if name.endswith(".parquet") else name]
    with pytest.raises(ValueError, match="model: expected a file or a folder that is there"):
        check_name("model", name)
