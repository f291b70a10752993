# SPDX-License-Identifier: Apache-2.0
"""The anchor "pre_projector" of mergers under FSDP2: the gradients of both ranks' batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.attached import both, compare
from tests.encoder_rows import encoder_rows
from tests.models.places import place_of
from tests.trainers import merger_ranks, processes
from tests.zoo import sample


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("merger ranks")
    processes.run(path, merger_ranks.work, len(merger_ranks.SCENES))
    return path


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", merger_ranks.NAMES)
def test_gradients_under_fully_shard(out: Path, name: str, checkpointing: bool) -> None:
    """FSDP averages over the ranks, of which each has the mean of its own tokens."""
    expected: dict[str, torch.Tensor] = {}
    terms, tokens = [], []
    for scene in merger_ranks.SCENES:
        batch = sample(name).batches[scene]
        _, gradients, _, (_, term) = both(
            batch.inputs, make=lambda: sample(name).model, mask=batch.visual,
            place=place_of(name), anchor="pre_projector", anchor_rows=encoder_rows,
        )  # fmt: skip
        terms.append(term)
        tokens.append(int(batch.visual.sum()))
        for key, x in gradients.items():
            expected[key] = expected.get(key, torch.zeros_like(x)) + x / len(merger_ranks.SCENES)
    mean = sum(n * x for n, x in zip(tokens, terms, strict=True)) / sum(tokens)
    for rank in range(len(merger_ranks.SCENES)):
        ours, metrics = torch.load(out / f"{name} {checkpointing} {rank}.pt")
        compare(ours, expected)
        assert metrics["visual_tokens"] == sum(tokens)
        assert metrics["pre_loss"] == pytest.approx(mean, rel=1e-4) != terms[rank]
