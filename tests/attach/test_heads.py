# SPDX-License-Identifier: Apache-2.0
"""The state of the heads: the number of training passes comes and goes with their parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model

from prereg_kernels import apply_pre
from tests.tiny import make_batch, tiny_llava

PASSES = "pre_heads._extra_state"


def trained(seed: int, passes: int = 3, **settings: Any) -> tuple[Any, Any]:
    """A model that has had so many training passes, and its handle."""
    model = tiny_llava(seed)
    pre = apply_pre(model, seed=seed, **settings)
    for number in range(passes):
        model(**make_batch(seed=number))
    return model, pre


def by_state(source: Any, target: Any, path: Path) -> None:
    target.load_state_dict(source.state_dict())


def by_assignment(source: Any, target: Any, path: Path) -> None:
    target.load_state_dict(source.state_dict(), assign=True)


def by_torch(source: Any, target: Any, path: Path) -> None:
    torch.save(source.state_dict(), path / "state")
    target.load_state_dict(torch.load(path / "state", weights_only=True))


def by_safetensors(source: Any, target: Any, path: Path) -> None:
    save_model(source, str(path / "state"))
    load_model(target, str(path / "state"))


def by_the_container(source: Any, target: Any, path: Path) -> None:
    target.pre_heads.load_state_dict(source.pre_heads.state_dict())


WAYS = (by_state, by_assignment, by_torch, by_safetensors, by_the_container)


@pytest.mark.parametrize("settings", ({}, {"depth": 0}, {"layers": (1, 3), "share_head": True}))
@pytest.mark.parametrize("way", WAYS)
def test_a_state_dict_has_the_passes(
    tmp_path: Path, way: Callable[..., None], settings: Any
) -> None:
    source, _ = trained(0, **settings)
    target, pre = trained(1, passes=1, **settings)
    way(source, target, tmp_path)
    assert pre.passes == 3
    ours, theirs = target.pre_heads.state_dict(), source.pre_heads.state_dict()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


@pytest.mark.parametrize("settings", ({}, {"depth": 0}))
def test_a_state_dict_of_before(settings: Any) -> None:
    """It has no passes, and leaves them, under strict loading too."""
    source, _ = trained(0, **settings)
    target, pre = trained(1, passes=1, **settings)
    state = source.state_dict()
    del state[PASSES]
    loaded = target.load_state_dict(state)
    assert not loaded.missing_keys and not loaded.unexpected_keys and pre.passes == 1
    assert torch.equal(target.lm_head.weight, source.lm_head.weight)


def test_without_its_heads_a_state_dict_misses_the_passes_too() -> None:
    """Trainer compares what is missing with what `save_pretrained` leaves out."""
    model, pre = trained(0)
    loaded = model.load_state_dict(tiny_llava().state_dict(), strict=False)
    assert set(loaded.missing_keys) == set(model._keys_to_ignore_on_save) >= {PASSES}
    assert pre.passes == 3


def test_a_meta_model_keeps_its_passes() -> None:
    model, pre = trained(0)
    state = {name: x.to("meta") for name, x in model.state_dict().items()}
    model.to("meta").load_state_dict(state)
    assert pre.passes == 3


def test_a_copy_has_passes_of_its_own() -> None:
    model, pre = trained(0)
    other = copy.deepcopy(model)
    other(**make_batch())
    assert (int(other.state_dict()[PASSES]), int(model.state_dict()[PASSES])) == (4, 3)
    assert pre.passes == 3


def test_ddp_has_nothing_to_broadcast() -> None:
    """A buffer of the heads on the CPU would be among those that NCCL has to send."""
    plain, (model, _) = tiny_llava(), trained(0)
    assert [name for name, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
