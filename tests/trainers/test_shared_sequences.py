# SPDX-License-Identifier: Apache-2.0
"""PReTrainer where ranks share sequences: the gradients of one process, over micro-batches too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, remove_pre
from tests.attached import compare
from tests.tiny import PATCHES, tiny_llava
from tests.trainers import shared_ranks as ranks
from tests.trainers.rows import eager_gradients


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    ranks.run(path)
    return path


@pytest.fixture(scope="module")
def expected() -> Any:
    model = tiny_llava()
    heads = apply_pre(model).heads
    remove_pre(model)
    return eager_gradients(heads, ranks.rows_of_all())


@pytest.mark.parametrize("case", ranks.CASES)
def test_gradients_are_those_of_one_process(out: Path, expected: Any, case: str) -> None:
    """Ulysses' are twice as large, of L_LM too: Trainer has one loss on both ranks of a pair."""
    factor = ranks.SIZE if case == "sp" else 1
    for rank in range(ranks.RANKS):
        ours, figures = torch.load(out / f"{case} {rank}.pt")
        compare(ours, {name: x * factor for name, x in expected.items()})
        assert figures["visual_tokens"] == 4 * PATCHES  # of the last micro-batch
