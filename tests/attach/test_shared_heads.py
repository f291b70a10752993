# SPDX-License-Identifier: Apache-2.0
"""One head for several layers, and heads that do not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.attach.handle import find_pre
from prereg_kernels.attach.storage import load_heads
from tests.attached import both, compare
from tests.tiny import WIDTH, make_batch, tiny_llava


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("level", ("patch", "global"))
def test_gradients_of_a_shared_head(checkpointing: bool, level: str) -> None:
    images = [4, 4, 4] if level == "global" else None
    ours, expected, metrics, (_, term) = both(
        make_batch((1, 2)), checkpointing=checkpointing, layers=(1, 3, 4), share_head=True,
        level=level, images=images,
    )  # fmt: skip
    compare(ours, expected)
    assert sum("pre_heads" in name for name in ours) == 4
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4)
    layers = [metrics[f"pre_loss/layer_{layer}"] for layer in (1, 3, 4)]
    assert len(set(layers)) == 3 and sum(layers) / 3 == pytest.approx(metrics["pre_loss"])


def test_a_shared_head_is_registered_and_saved_once(tmp_path: Path) -> None:
    model = tiny_llava()
    pre = apply_pre(model, layers=(1, 3), share_head=True)
    assert list(pre.heads) == [1, 3] and pre.heads[1] is pre.heads[3]
    names = {name for name, _ in model.named_parameters() if "pre_heads" in name}
    assert names == {f"pre_heads.shared.{p}_{j}" for p in ("weight", "bias") for j in (0, 1)}
    pre.save(tmp_path)
    assert set(load_heads(tmp_path).heads) == {name.removeprefix("pre_heads.") for name in names}
    again = apply_pre(tiny_llava(), from_pretrained=tmp_path)
    assert again.config.share_head and again.heads[1] is again.heads[3]
    with pytest.raises(ValueError, match="share_head=True, expected False"):
        apply_pre(tiny_llava(), layers=(1, 3)).load(tmp_path)
    remove_pre(model)
    assert not [name for name, _ in model.named_parameters() if "pre_heads" in name]


def freeze_all(model: Any, pre: Any) -> None:
    """As get_peft_model does."""
    model.requires_grad_(False)


def freeze_one(model: Any, pre: Any) -> None:
    pre.heads[3].requires_grad_(False)


@pytest.mark.parametrize("freeze, layer", ((freeze_all, 1), (freeze_one, 3)))
def test_a_frozen_head_raises_in_the_first_step(freeze: Any, layer: int) -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model, layers=(1, 3))
    freeze(model, pre)
    message = rf"pre\.heads: .* frozen one at layer {layer} \(PEFT.*call requires_grad_\(True\)"
    with pytest.raises(ValueError, match=message):
        model(**batch)
    model.eval()(**batch)
    for head in pre.heads.values():
        head.requires_grad_(True)
    model.train()(**batch).loss.backward()
    assert pre.heads[layer].weight_0.grad.norm() > 0


def test_a_partly_frozen_head_and_none_at_all_train() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    pre.heads[2].weight_0.requires_grad_(False)
    model(**batch).loss.backward()
    assert pre.heads[2].weight_1.grad.norm() > 0 and pre.heads[2].weight_0.grad is None
    remove_pre(model)
    apply_pre(model, depth=0)
    model(**batch).loss.backward()


def test_the_handle_inside_of_a_wrapper() -> None:
    model = tiny_llava()
    with pytest.raises(ValueError, match=r"plain Llava.*call prereg_kernels\.apply_pre"):
        find_pre(model)
    pre = apply_pre(model)
    wrapper = torch.nn.DataParallel(torch.nn.ModuleDict({"model": model}))
    assert find_pre(wrapper) is pre
    with pytest.raises(ValueError, match="model: PRe is attached already"):
        apply_pre(wrapper)
    remove_pre(wrapper)
    with pytest.raises(ValueError, match="model: PRe is not attached"):
        remove_pre(wrapper)


def test_the_width_where_the_embedding_is_partitioned() -> None:
    """ZeRO-3 leaves an empty weight of each module that it made."""
    model = tiny_llava()
    model.get_input_embeddings().weight.data = torch.empty(0)
    head = apply_pre(model).heads[2]
    assert [tuple(x.shape) for x in head.weights] == [(WIDTH, WIDTH), (WIDTH, WIDTH)]
