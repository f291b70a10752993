# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING's source of training data, as a file of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sample import BadSampleError
from tests.docs.pages import page_of


def test_a_source_of_one_file(tmp_path: Path) -> None:
    [block] = [b for b in page_of("CONTRIBUTING.md").blocks if "CaptionsSource" in b.text]
    (tmp_path / "captions.py").write_text(block.text)
    spec = importlib.util.spec_from_file_location("captions", tmp_path / "captions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    records = [{"file": "a.jpg", "caption": "A cat."}, {"file": 3}]
    (tmp_path / "d.json").write_text(json.dumps(records))
    source = module.open_source(DataConfig(str(tmp_path / "d.json"), "captions"))
    sample = source[0]
    assert sample.images == ["a.jpg"] and sample.root == tmp_path
    assert sample.messages[1]["content"] == [{"type": "text", "text": "A cat."}]
    assert sample.messages[0]["content"][0] == {"type": "image"}
    with pytest.raises(BadSampleError, match='expected "file" and "caption"'):
        source[1]
