# SPDX-License-Identifier: Apache-2.0
"""The mark `first`: the tests that a GPU should run before all others, about forty.

Both dtypes of training at rows that fill no tile, in one chunk and in several; each stage that can
be fused; graphs, streams and waiting; the bits; what is held; training as a user does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Parameters = dict[str, Any]
DTYPES = (torch.bfloat16, torch.float32)


def anything(parameters: Parameters) -> bool:
    return True


def in_16_bits(parameters: Parameters) -> bool:
    return bool(parameters["dtype"] == torch.bfloat16)


FIRST: dict[str, Callable[[Parameters], bool]] = {
    # (file, test): which of its cases
    "test_rule.py::test_rows_around_a_tile": lambda p: p["tokens"] == 129 and p["dtype"] in DTYPES,
    "test_rule.py::test_columns": lambda p: p["widths"][-1] == 4096 and in_16_bits(p),
    "test_rule.py::test_no_head": in_16_bits,
    "test_rule.py::test_master_weights": in_16_bits,
    "test_rule.py::test_mask_and_weights": anything,
    "test_rule.py::test_no_visual_tokens": anything,
    "test_fusion.py::test_one_stage": lambda p: p["tokens"] == 129 and in_16_bits(p),
    "test_streams.py::test_does_not_wait_for_the_device": anything,
    "test_streams.py::test_side_stream": anything,
    "test_streams.py::test_graph": anything,
    "test_strides.py::test_gradient_from_the_later_layers": anything,
    "test_repeatable.py::test_bitwise": lambda p: p["dtype"] in DTYPES,
    "test_memory.py::test_tap_holds_nothing": anything,
    "test_training.py::test_compiled_tap": anything,
    "test_training.py::test_scaler_step": anything,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if name in FIRST and FIRST[name](parameters):
            item.add_marker(pytest.mark.first)
