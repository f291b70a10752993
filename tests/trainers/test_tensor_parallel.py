# SPDX-License-Identifier: Apache-2.0
"""Ranks that have the same hidden states: each does a share, and all have the gradients of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from prereg_kernels import apply_pre, eager_pre_loss, remove_pre
from tests.attached import eager_term
from tests.helpers import make_problem, relative_error
from tests.tiny import PATCHES, WIDTH, gradients, make_batch, tiny_llava
from tests.trainers import tensor_ranks as ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tensors")
    config = tiny_llava().config
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 4
    config.text_config.head_dim = 6
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).double().save_pretrained(path / "model")
    ranks.run(path)
    return path


def read(out: Path, name: str) -> list[Any]:
    return [torch.load(out / f"{name} {rank}.pt") for rank in range(ranks.RANKS)]


def joined(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """The whole of this shape, cut by ranks along one dimension."""
    [dim] = [d for d, length in enumerate(shape) if parts[0].shape[d] != length]
    return torch.cat(parts, dim)


@pytest.mark.parametrize("case", [case for case in ranks.CASES if case != "a fraction"])
def test_gradients_and_figures_are_those_of_a_rank_alone(out: Path, case: str) -> None:
    """On two ranks and on four; and the bits are the same on each, and the second time."""
    alone, *everything = (found[case] for found in read(out, "cases"))
    (expected, figures), two, four, _ = alone
    for size, (ours, found) in ((2, two), (4, four)):
        for name, x in expected.items():
            assert relative_error(ours[name], x) < 1e-12 or x.norm() < 1e-14, name
        # A token counts once in a group, and each rank alone has all of them
        once = {n: x / size for n, x in figures.items() if n in ("visual_tokens", "images")}
        assert found == pytest.approx(figures | once)
    for each in [alone, *everything]:
        for ours, same in zip(each[1:], (two, four, four), strict=True):
            assert ours[1] == same[1]
            assert all(torch.equal(x, same[0][name]) for name, x in ours[0].items())


def test_a_group_reads_the_same_fraction(out: Path) -> None:
    """That of its first rank; each of two groups another."""
    (alone, two, four, _), *others = (found["a fraction"] for found in read(out, "cases"))
    for name, x in alone[0].items():
        for ours in (two, four, *(each[2] for each in others)):
            assert relative_error(ours[0][name], x) < 1e-12 or x.norm() < 1e-14, name
    name = "pre_heads.2.weight_0"
    assert torch.equal(two[0][name], others[0][1][0][name])
    assert not torch.equal(two[0][name], others[1][1][0][name])
    assert torch.equal(others[1][1][0][name], others[2][1][0][name])


def test_a_model_that_transformers_has_split(out: Path) -> None:
    """Gradients by the definition, in one process; the heads stay equal through steps."""
    model = LlavaForConditionalGeneration.from_pretrained(out / "model", dtype=torch.float64)
    pre, batch = apply_pre(model.train()), make_batch(ranks.IMAGES)
    heads = pre.heads
    remove_pre(model)
    batch["pixel_values"] = batch["pixel_values"].double()
    lm, term = eager_term(model, batch, heads)
    (lm + ranks.WEIGHT * term).backward()
    expected = gradients(model)
    expected |= {f"pre_heads.2.{name}": p.grad for name, p in heads[2].named_parameters()}
    expected = {name: x for name, x in expected.items() if x.norm() > 1e-9}
    states = read(out, "loaded")
    for is_found, ours, figures, parameters in states:
        assert is_found
        for name, x in expected.items():
            if (whole := ours[name]).shape != x.shape:  # a part, where transformers has no DTensor
                whole = joined([found[name] for _, found, *_ in states], x.shape)
            assert relative_error(whole, x) < 3e-6, name
        assert figures["visual_tokens"] == sum(ranks.IMAGES) * PATCHES
        assert figures["pre_loss"] == pytest.approx(term.item(), rel=1e-6)
        assert figures["lm_loss"] == pytest.approx(lm.item(), rel=1e-6)
        assert all(map(torch.equal, parameters, states[0][3]))
        assert not any(map(torch.equal, parameters, heads[2].parameters()))


def test_the_products_of_a_rank_fall_with_the_group(out: Path) -> None:
    """80 tokens on 1, 2, 4 ranks; and 10, of which the last of four has one.

    And in a step of a model, of 12 tokens and of 3 images, on 2 and 4; as it evaluates, too.
    """
    matrices, of_model = 16 * 24 + 24 * 20, 2 * WIDTH * ranks.HEAD
    for rank, (counts, uneven, heads, images, values) in enumerate(read(out, "flops")):
        assert counts == [6 * matrices * tokens for tokens in (80, 40, 20)]
        last = 1 if rank == 3 else 3
        assert uneven == [6 * matrices * tokens for tokens in (10, 5, last)]
        assert heads == [6 * of_model * tokens for tokens in (6, 3)]
        assert images == [6 * of_model * (2 - rank % 2), 6 * of_model * (rank < 3)]
        assert values == [2 * of_model * tokens for tokens in (6, 3)]


def test_figures_of_a_pass_that_evaluates(out: Path) -> None:
    """Those of a rank alone, which has all of the tokens; the shares make the same mean."""
    for found in read(out, "evaluated"):
        for alone, *shared in found:
            assert alone["pre_loss"] != 0
            for size, figures in zip((2, 4), shared, strict=True):
                once = {n: alone[n] / size for n in ("visual_tokens", "images") if n in alone}
                assert figures == pytest.approx(alone | once, rel=1e-12)


def test_ranks_with_tokens_of_their_own(out: Path) -> None:
    problem = make_problem((1, 8 * ranks.RANKS), ranks.WIDTHS, dtype=torch.float64)
    leaves = problem.leaves()
    loss = eager_pre_loss(*problem.arguments(leaves))
    (leaves["hidden"].sum() + 2 * loss).backward()
    for rank, ours in enumerate(read(out, "own")):
        assert ours.keys() == {name for name, x in leaves.items() if x.grad is not None}
        for name, x in ours.items():
            expected = leaves[name].grad
            if name == "hidden":
                mine = slice(8 * rank, 8 * rank + 8)
                x, expected = x[:, mine], expected[:, mine]
            assert relative_error(x, expected) < 1e-12, name


def test_tokens_of_their_own_are_counted_on_each_rank(out: Path) -> None:
    for figures in read(out, "region"):
        assert figures["visual_tokens"] == sum(ranks.IMAGES) * PATCHES * ranks.RANKS
