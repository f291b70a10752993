# SPDX-License-Identifier: Apache-2.0
"""PRe's settings as a file or a command line has them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from prereg_kernels import apply_pre
from prereg_kernels.trainers.attachment import read_settings
from tests.tiny import tiny_llava


def test_what_a_file_says() -> None:
    written = yaml.safe_load("{layers: [1, 2], weight: 3e-1, head_learning_rate: 1e-3, depth: 3}")
    assert written["weight"] == "3e-1", "PyYAML reads it as text"
    config = apply_pre(tiny_llava(), **read_settings(written)).config
    assert (config.layers, config.weight, config.depth) == ([1, 2], 0.3, 3)
    assert config.head_learning_rate == 1e-3
    assert read_settings(None) == read_settings({}) == {}


@pytest.mark.parametrize(
    "written, message",
    [
        ("mine.yaml", "pre: expected settings such as {weight: 0.5}, got 'mine.yaml'"),
        ({"wieght": 1}, "pre.wieght: not a setting of PRe; expected one of layers, weight"),
        ({"weight": "much"}, "pre.weight: expected a non-negative finite number, got 'much'"),
        ({"level": "image"}, "pre.level: expected one of patch, global; got 'image'"),
        ({"family": "llava"}, "pre.family: expected it in Python, got 'llava'"),
    ],
)
def test_what_is_wrong(written: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings(written)
