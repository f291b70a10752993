# SPDX-License-Identifier: Apache-2.0
"""What was trained with PRe, saved with it attached or taken off, and read without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.attach.handle import PRe, get_pre
from tests.attach.families.batches import make_batch
from tests.attach.families.models import make_model
from tests.integrations.test_peft import with_lora

each_kind = pytest.mark.parametrize("kind", ("whole", "adapter", "merged"))


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def train_a_step(model: Any, pre: PRe, batch: dict[str, Any]) -> None:
    """So that nothing is as it was made."""
    for head in pre.heads.values():
        head.requires_grad_(True)
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()


@each_kind
@pytest.mark.parametrize("is_removed", (False, True), ids=("attached", "removed"))
def test_it_gives_what_was_trained(tmp_path: Path, kind: str, is_removed: bool) -> None:
    base, folder = tmp_path / "base", tmp_path / "saved"
    model = make_model("llava")
    batch = make_batch("llava", model).inputs
    before = logits(model, batch)
    names = list(model.state_dict())
    model.save_pretrained(base)

    trained: Any = model.train() if kind == "whole" else with_lora(model).train()
    pre = apply_pre(trained)
    train_a_step(trained, pre, batch)
    heads = {n: x.clone() for n, x in pre.heads[2].state_dict().items()}
    expected = logits(trained, batch)
    if is_removed:
        remove_pre(trained)
    (trained.merge_and_unload() if kind == "merged" else trained).save_pretrained(folder)

    read: Any
    if kind == "adapter":
        plain = AutoModelForImageTextToText.from_pretrained(base)
        read = peft.PeftModel.from_pretrained(plain, folder)
    else:
        read, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert list(read.state_dict()) == names
    assert get_pre(read) is None
    ours = logits(read, batch)
    assert (ours - before).abs().max() > 1e-3
    if kind == "merged":  # W + B A is rounded once more
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(ours, expected)

    # The heads are beside a model, not beside an adapter, whose file has none
    has_heads = kind != "adapter" and not is_removed
    assert (folder / "pre").exists() == has_heads
    if has_heads:
        again = apply_pre(read, from_pretrained=folder)
        saved = again.heads[2].state_dict()
        assert all(torch.equal(x, saved[n]) for n, x in heads.items())
