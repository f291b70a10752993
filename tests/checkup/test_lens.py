# SPDX-License-Identifier: Apache-2.0
"""The logit lens: top tokens, their counts, and what is read from these."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import nn

from prereg_kernels.checkup import Lens, LensSums, TopToken, logit_lens
from prereg_kernels.checkup.collect import logit_lens_of
from prereg_kernels.checkup.measures import lens
from tests.attach.families.models import make_model


def test_by_hand() -> None:
    # eight tokens say 0, four say 2, four say 3
    says = torch.tensor([0] * 8 + [2] * 4 + [3] * 4)
    got = logit_lens(torch.eye(4)[says], nn.Identity(), torch.eye(4), few=1)
    assert got.silenced == 0.5
    assert got.entropy == pytest.approx(1.5)  # bits
    assert got.most_frequent == (TopToken(0, 8), TopToken(2, 4), TopToken(3, 4))
    few = logit_lens(torch.eye(4)[says], nn.Identity(), torch.eye(4), few=2, listed=1)
    assert few.silenced == 0.75
    assert few.most_frequent == (TopToken(0, 8),)


def test_counts_that_were_added_up() -> None:
    sums = LensSums(nn.Identity(), torch.eye(4)).update(torch.eye(4)[[0, 2, 2]])
    assert sums.times == {0: 1, 2: 2}
    assert Lens.of(sums.times) == sums.result()
    # ties by id, wherever they stand
    assert Lens.of({9: 1, 3: 1, 7: 2}, few=2) == (0.75, 1.5, ((7, 2), (3, 1), (9, 1)))


def test_equals_the_models_own_head_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = nn.RMSNorm(6)
    norm.weight.data = torch.rand(6, generator=generator) + 0.5
    head = nn.Linear(6, 50)
    head.weight.data = torch.randn(50, 6, generator=generator)
    head.bias.data = 3 * torch.randn(50, generator=generator)
    features = torch.randn(200, 6, generator=generator) * 10
    top = head(norm(features)).argmax(dim=1)
    tokens, times = top.unique(return_counts=True)
    expected = dict(zip(tokens.tolist(), times.tolist(), strict=True))
    without = (norm(features) @ head.weight.T).argmax(dim=1)
    assert (top != without).any()  # the bias matters

    monkeypatch.setattr(lens, "VOCABULARY", 7)
    got = logit_lens(features, norm, head.weight, head.bias, listed=50)
    assert dict(got.most_frequent) == expected
    assert [t.times for t in got.most_frequent] == sorted(expected.values(), reverse=True)
    assert got.silenced == sum(sorted(expected.values())[-5:]) / 200


def test_ties_go_to_the_first_token_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(20, 3)
    for pieces in (4, 20):
        monkeypatch.setattr(lens, "VOCABULARY", pieces)
        got = logit_lens(torch.ones(5, 3), nn.Identity(), weight)
        assert got == (1.0, 0.0, (TopToken(0, 5),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_float32_under_autocast_and_in_bfloat16(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 2**-7]], dtype=torch.bfloat16)
    features = torch.tensor([[256.0, 1.0]], dtype=dtype)  # 256 and 256.008: equal in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        got = logit_lens(features, nn.Identity(), weight)
    assert got.most_frequent == (TopToken(1, 1),)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="features: expected at least 1 row in all, got 0"):
        logit_lens(torch.ones(0, 3), nn.Identity(), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"features: expected shape \(N, 3\), got \(2, 2\)"):
        logit_lens(torch.ones(2, 2), nn.Identity(), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"weight, bias: expected .* got \(4, 3\) and \(3,\)"):
        LensSums(nn.Identity(), torch.ones(4, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"weight, bias: .* got \(4,\) and None"):
        LensSums(nn.Identity(), torch.ones(4))
    for bad in (math.nan, math.inf):
        weight = torch.ones(4, 3)
        weight[2, 0] = bad
        with pytest.raises(ValueError, match="norm, weight, bias: expected finite logits"):
            logit_lens(torch.ones(2, 3), nn.Identity(), weight)


@pytest.mark.parametrize("target", ("lora", "modules_to_save"))
def test_the_lens_has_what_an_adapter_adds(target: str) -> None:
    """Of LoRA on the head it read the weight alone: two of five top tokens were others."""
    generator = torch.Generator().manual_seed(0)
    model: Any = make_model("llava").eval()
    places: Any = {"target_modules": ["lm_head"]}
    if target == "modules_to_save":
        places = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **places))
    whole: Any = adapted.get_base_model()
    if target == "modules_to_save":
        with torch.no_grad():
            weight = whole.lm_head.weight
            weight.copy_(torch.randn(weight.shape, generator=generator))
    width = whole.config.text_config.hidden_size
    features = torch.randn(200, width, generator=generator)
    top = whole.lm_head(whole.model.language_model.norm(features)).argmax(dim=1)
    ids, counts = top.unique(return_counts=True)
    expected = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    assert logit_lens_of(whole)(features).times == expected
