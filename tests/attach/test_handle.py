# SPDX-License-Identifier: Apache-2.0
"""The handle: what is public on it, and where names of version 0.1 lead."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, find_pre
from prereg_kernels.attach.handle import state_of
from prereg_kernels.attach.storage import load_heads
from tests.tiny import make_batch, tiny_llava

PUBLIC = (
    "heads metrics totals count check visual_mask next_visual_mask denominator passes save load "
    "loss add_to_loss "
    # a GradScaler's loop, a loss of several passes and a log have no other way
    "loss_scale collecting config family parameter_groups "
    # a loop that has a schedule for the weight, and looks at the gradients now and then
    "weight watches_gradients "
    # process groups, which no model knows of
    "sequence_parallel tensor_parallel_group"
)


def test_public_names() -> None:
    pre = apply_pre(tiny_llava())
    assert {name for name in dir(pre) if not name.startswith("_")} == set(PUBLIC.split())


def test_attributes_follow_the_passes() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model, layers=(1, 3))
    state = state_of(pre)
    assert (pre.heads, pre.config) == (state.heads, state.config)
    assert (pre.passes, pre.loss, pre.denominator) == (0, None, None)
    del batch["labels"]
    model(**batch)
    assert pre.passes == 1 and pre.loss is state.loss is not None
    pre.loss = None
    assert state.loss is None


@pytest.mark.parametrize(
    "name, value",
    (("denominator", 7), ("loss_scale", 0.5), ("add_to_loss", False), ("passes", 3)),
)
def test_what_a_loop_sets_is_what_the_passes_read(name: str, value: Any) -> None:
    pre = apply_pre(tiny_llava())
    other = apply_pre(tiny_llava())
    before = getattr(other, name)
    setattr(pre, name, value)
    assert getattr(pre, name) == getattr(state_of(pre), name) == value != before
    assert getattr(other, name) == before


def test_check_finds_a_frozen_head() -> None:
    model = tiny_llava()
    pre = apply_pre(model, layers=(1, 3))
    pre.check()
    pre.heads[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"pre\.heads: expected heads that train.* at layer 3"):
        pre.check()


def test_a_name_that_is_not_there() -> None:
    pre: Any = apply_pre(tiny_llava())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributeError, match="'PRe' object has no attribute 'denomnator'"):
            pre.denomnator  # noqa: B018
        assert not hasattr(pre, "__deepcopy__")
        assert pickle.loads(pickle.dumps(copy.copy(pre))).passes == 0


def test_names_of_version_0_1(tmp_path: Path) -> None:
    model, batch = tiny_llava(), make_batch()
    pre: Any = apply_pre(model, layers=(1, 3))
    model(**batch).loss.backward()
    with pytest.warns(DeprecationWarning, match=r"PRe\.model is no longer public; use the model"):
        assert pre.model is model
    with pytest.warns(DeprecationWarning, match=r"PRe\.anchor_features"):
        assert pre.anchor_features == len(pre.heads[1].bias_1)
    with pytest.warns(DeprecationWarning, match=r"PRe\.last .* pre\.metrics"):
        assert pre.last.tokens == pre.metrics()["visual_tokens"] > 0
    with pytest.warns(DeprecationWarning, match=r"PRe\.hooks .*remove_pre"):
        assert len(pre.hooks) > 3
    pre.heads[3].requires_grad_(False)
    with (
        pytest.warns(DeprecationWarning, match=r"PRe\.check_heads_train .* use pre\.check"),
        pytest.raises(ValueError, match="frozen one at layer 3"),
    ):
        pre.check_heads_train()
    other = apply_pre(tiny_llava(), layers=(1, 3), seed=2)
    other.save(tmp_path)
    with pytest.warns(DeprecationWarning, match=r"PRe\.fill .* use pre\.load"):
        pre.fill(load_heads(tmp_path), tmp_path)
    assert torch.equal(pre.heads[1].weight_0, other.heads[1].weight_0)
    with pytest.warns(DeprecationWarning, match=r"PRe\.detach .* use .*remove_pre\(model\)"):
        pre.detach()
    with pytest.raises(ValueError, match="expected one with PRe attached"):
        find_pre(model)


def test_a_copy_takes_no_pending_term_over() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    del batch["labels"]
    model(**batch)
    with pre.collecting():
        clone = copy.deepcopy(model)
    assert find_pre(clone).loss is None and pre.loss is not None
    assert state_of(find_pre(clone)).collected is None
