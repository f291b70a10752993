# SPDX-License-Identifier: Apache-2.0
"""Whatever is in a model directory: it loads, or one ValueError names the directory."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prereg_kernels.checkup.loading import load
from tests.checkup.pictures import save_model
from tests.fuzzing import fuzz

ODD = st.sampled_from(
    [None, -1, 0, 1, 3, 10**6, 2**63, 0.5, 1e308, math.nan, math.inf, "", "x", [], [1], {}, True]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("fuzz") / "whole", "qwen2_5_vl")


def _loads_or_says_why(model: Path, changed: str, content: bytes) -> None:
    """With another content of one file."""
    directory = model.parent / "changed"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(model, directory)
    (directory / changed).write_bytes(content)
    try:
        load(directory)
    except ValueError as error:
        assert str(directory) in str(error) and str(error).strip()


@fuzz(12)
@given(st.data())
def test_damaged_weights(model: Path, data: st.DataObject) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, header - 1))
        content[at : at + 1] = data.draw(st.binary(max_size=3))
    _loads_or_says_why(model, "model.safetensors", bytes(content))


@fuzz(25)
@given(st.sampled_from(["config.json", "preprocessor_config.json"]), st.data())
def test_strange_settings(model: Path, name: str, data: st.DataObject) -> None:
    settings: Any = json.loads((model / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        part = settings
        while True:
            key = data.draw(st.sampled_from(sorted(part)))
            if not isinstance(part[key], dict) or not part[key] or data.draw(st.booleans()):
                break
            part = part[key]
        part[key] = data.draw(ODD)
    text = json.dumps(settings).encode()
    cut = data.draw(st.sampled_from([len(text)] * 4 + [len(text) // 2]))
    _loads_or_says_why(model, name, text[:cut])
