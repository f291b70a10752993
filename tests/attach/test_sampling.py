# SPDX-License-Identifier: Apache-2.0
"""Which visual tokens a pass regularises: how many, which, and that the estimate is unbiased."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels._util import distributed
from prereg_kernels.attach.sampling import choose_tokens
from tests.tiny import PATCHES, gradients, make_batch, tiny_llava

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "tokens, fraction, count",
    ((0, 0.5, 0), (1, 0.01, 1), (10, 0.01, 1), (10, 0.3, 3), (30, 0.1, 3), (10, 1.0, 10),
     (576, 0.25, 144)),
)  # fmt: skip
def test_how_many(tokens: int, fraction: float, count: int) -> None:
    chosen = choose_tokens(tokens, fraction, (0, 0, 0), CPU).tolist()
    assert len(chosen) == count and chosen == sorted(set(chosen))
    assert all(0 <= token < tokens for token in chosen)


def test_every_subset_is_as_likely() -> None:
    """Chi-squared of the ten pairs of five tokens; its 99.9th percentile is 27.9."""
    draws = 2000
    seen = Counter(tuple(choose_tokens(5, 0.4, (0, 0, i), CPU).tolist()) for i in range(draws))
    expected = draws / math.comb(5, 2)
    chi_squared = sum((seen[p] - expected) ** 2 / expected for p in combinations(range(5), 2))
    assert sum(seen.values()) == draws and chi_squared < 27.9


@pytest.mark.parametrize("other", ((1, 0, 0), (0, 1, 0), (0, 0, 1)), ids=("seed", "rank", "pass"))
def test_a_draw_is_a_function_of_its_address(other: tuple[int, ...]) -> None:
    global_state = torch.get_rng_state()
    first = choose_tokens(400, 0.5, (0, 0, 0), CPU)
    assert torch.equal(first, choose_tokens(400, 0.5, (0, 0, 0), CPU))
    common = set(first.tolist()) & set(choose_tokens(400, 0.5, other, CPU).tolist())
    assert 70 < len(common) < 130  # 100 by chance
    assert torch.equal(torch.get_rng_state(), global_state)


def head_gradient(pre: Any, model: Any, *batches: Any) -> torch.Tensor:
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    return gradients(model)["pre_heads.2.weight_1"].double()


def expectation(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], denominator: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient averaged over all draws of half of each batch's tokens, and that of all."""
    batches = [make_batch((count,), seed=count) for count in counts]
    results = []
    for fraction in (0.4, 1.0):
        model = tiny_llava().requires_grad_(False)
        pre = apply_pre(model, token_fraction=fraction)
        pre.denominator = denominator
        means = []
        for batch, count in zip(batches, counts, strict=True):
            tokens = count * PATCHES
            drawn = round(fraction * tokens)
            several = []
            for subset in combinations(range(tokens), drawn):
                chosen = torch.tensor(subset)
                monkeypatch.setattr(
                    "prereg_kernels.attach.hooks.choose_tokens", lambda *_, c=chosen: c
                )
                several.append(head_gradient(pre, model, batch))
            means.append(torch.stack(several).mean(dim=0))
        results.append(torch.stack(means).sum(dim=0))
    return results[0], results[1]


@pytest.mark.parametrize("counts, denominator", (((2,), None), ((1, 2), 3 * PATCHES)))
def test_the_expectation_is_the_gradient_of_all(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], denominator: int | None
) -> None:
    """Over every subset, 2 of 4 tokens and 3 of 8: rounded, not the same part of each batch."""
    ours, expected = expectation(monkeypatch, counts, denominator)
    assert torch.linalg.norm(ours - expected) < 1e-6 * expected.norm()


@pytest.mark.parametrize("denominator", (None, 40))
@pytest.mark.parametrize("value_in_forward", (False, True))
def test_metrics_estimate_the_mean_of_all(denominator: int | None, value_in_forward: bool) -> None:
    """By hand, where all tokens have the same loss; the sums are those of all tokens."""
    model, batch = tiny_llava(), make_batch((1, 2))
    pre = apply_pre(
        model, token_fraction=0.25, value_in_forward=value_in_forward, loss="mse",
        anchor=lambda inputs: torch.full((12, 5), 2.0), anchor_features=5,
    )  # fmt: skip
    for parameter in pre.heads[2].parameters():
        parameter.data.zero_()
    pre.denominator = denominator
    model(**batch).loss.backward()
    assert pre.metrics()["pre_loss"] == pytest.approx(4.0)
    assert pre.metrics()["visual_tokens"] == 12
    assert pre.totals().tolist() == pytest.approx([12.0, 48.0])


def drawn(model: Any, pre: Any, batch: Any) -> list[int]:
    """The positions that a pass reads."""
    seen = []
    hook = pre.heads[2].register_forward_pre_hook(
        lambda head, args, kwargs: seen.append(kwargs["visual_index"].tolist()), with_kwargs=True
    )
    model(**batch).loss.backward()
    hook.remove()
    return seen[0]


def test_each_pass_draws_anew_and_a_loaded_handle_goes_on(tmp_path: Any) -> None:
    batch = make_batch((2, 2))
    model = tiny_llava()
    pre = apply_pre(model, token_fraction=0.5)
    first, second = drawn(model, pre, batch), drawn(model, pre, batch)
    assert first != second and len(first) == len(second) == 8
    model.eval()(**batch)
    model.train()
    pre.save(tmp_path)
    third = drawn(model, pre, batch)
    again = tiny_llava()
    resumed = apply_pre(again, from_pretrained=tmp_path)
    assert drawn(again, resumed, batch) == third


def test_the_seed_is_that_of_the_draw() -> None:
    batch, draws = make_batch((2, 2)), []
    for seed in (0, 1, 1):
        model = tiny_llava()
        draws.append(drawn(model, apply_pre(model, token_fraction=0.5, seed=seed), batch))
    assert draws[0] != draws[1] == draws[2]


def test_ranks_draw_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those that share a batch, under tensor parallelism."""
    batch, draws = make_batch((2, 2)), []
    for rank, size in ((0, None), (1, None), (2, 2), (3, 2)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        model = tiny_llava()
        monkeypatch.setattr(type(model), "tp_size", size, raising=False)
        pre = apply_pre(model, token_fraction=0.5)
        draws.append(drawn(model, pre, batch))
    assert draws[0] != draws[1] and draws[1] == draws[2] == draws[3]


def test_evaluation_reads_all_tokens() -> None:
    model, batch = tiny_llava().eval(), make_batch((1, 2))
    values = []
    for fraction in (0.25, 1.0):
        pre = apply_pre(model, token_fraction=fraction, value_in_eval=True)
        model(**batch)
        values.append(pre.metrics()["pre_loss"])
        remove_pre(model)
    assert values[0] == values[1] != 0


def test_a_text_only_batch() -> None:
    model = tiny_llava()
    pre = apply_pre(model, token_fraction=0.5)
    model(**make_batch((0, 0))).loss.backward()
    assert pre.metrics()["pre_loss"] == 0
    assert pre.heads[2].weight_0.grad.count_nonzero() == 0
