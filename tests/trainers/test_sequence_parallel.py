# SPDX-License-Identifier: Apache-2.0
"""Ranks that share sequences: the gradients and figures of one process, on two and four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, remove_pre
from tests.attached import eager_term
from tests.helpers import relative_error
from tests.tiny import PATCHES, gradients, tiny_llava
from tests.trainers import sequence_ranks as ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sequences")
    ranks.run(path)
    return path


def expected_of(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The gradients of one process by the definition, and L_PRe.

    All is float64 but what the model itself computes in float32: norms, positions, softmax.
    """
    model, batch = tiny_llava().double(), ranks.batch_of_all()
    pre = apply_pre(model, **settings)
    heads = pre.heads
    remove_pre(model)
    images = [PATCHES] * 3 if settings.get("level") == "global" else None
    anchor = settings.get("anchor")
    if anchor == "pre_projector":
        with torch.no_grad():
            seen = []
            hook = model.model.multi_modal_projector.register_forward_pre_hook(
                lambda module, args: seen.append(args[0].flatten(0, 1))
            )
            model(**batch)
            hook.remove()
        anchor = lambda inputs: seen[0]  # noqa: E731
    lm, term = eager_term(model, batch, heads, images=images, anchor=anchor)
    (lm + ranks.WEIGHT * term).backward()
    found = gradients(model)
    for layer, head in heads.items():
        found |= {f"pre_heads.{layer}.{name}": p.grad for name, p in head.named_parameters()}
    return found, term.item()


OF_HEADS = ("layers", "level", "anchor", "anchor_features")


@pytest.mark.parametrize(
    "case, size", [(case, 2) for case in ranks.CASES] + [(case, 4) for case in ranks.OF_FOUR]
)
def test_gradients_and_figures_are_those_of_one_process(out: Path, case: str, size: int) -> None:
    settings = {name: x for name, x in ranks.CASES[case].items() if name in OF_HEADS}
    expected, term = expected_of(settings)
    for rank in range(ranks.RANKS):
        ours, figures = torch.load(out / f"{case} {size} {rank}.pt")
        assert ours.keys() == expected.keys()
        for name, x in expected.items():
            assert relative_error(ours[name], x) < 3e-6 or x.norm() < 1e-9, (name, rank)
        # Of all ranks: two groups of two have the batch each
        assert figures["visual_tokens"] == 3 * PATCHES * ranks.RANKS / size
        assert figures["pre_loss"] == pytest.approx(term, rel=1e-6)
