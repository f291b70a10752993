# SPDX-License-Identifier: Apache-2.0
"""A step on the meta device has the products that torch counts in a real one."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prereg_kernels.attach.resolver import resolve
from prereg_kernels.estimate.batches import made_up_batches
from prereg_kernels.estimate.walk import CHUNK, lengthened, walk
from prereg_kernels.train.parts import parts_of, set_trainable
from tests.zoo import CASES, sample

# Inkling's attention has a bias that is computed of its states, Florence-2 a decoder of text;
# Gemma 3n embeds words with its projectors.
QUICK = ("llava", "qwen2_5_vl", "qwen3_vl_moe", "inkling_mm_model", "florence2", "gemma3n")
REFUSED = {"git", "idefics", "mllama"}  # of which PRe knows no parts


def convolution_backward(
    gradient: Any, x: Any, weight: Any, *rest: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """As many as forward for each gradient. torch counts those of one group, whatever it has."""
    *_, is_transposed, _, _, mask = rest
    rows = x if is_transposed else gradient
    return 2 * math.prod(rows) * math.prod(weight[1:]) * sum(mask[:2])


def counted(model: Any, inputs: dict[str, Any]) -> tuple[int, int]:
    """By torch, forward and in all. Attention and experts take code that it counts."""
    with_experts = getattr(model, "set_experts_implementation", None)
    if with_experts is not None:
        with_experts("eager")
    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(**inputs).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def on_meta(model: nn.Module) -> Any:
    twin: Any = copy.deepcopy(model).to("meta")
    twin.tie_weights()
    return twin


def check(name: str, trains: tuple[str, ...], *, by_default: bool = False) -> None:
    """Of a longer batch than the ones that were walked through; by_default: at the lengths that
    the walk takes by itself."""
    case = sample(name)
    batch = next(case.batches[scene] for scene in ("images", "videos") if scene in case.batches)
    parts = parts_of(case.model)
    trains = tuple(part for part in trains if parts[part])
    # Between multiples of it, linear attention's products are those of a whole chunk more
    short = batch.inputs["input_ids"].shape[1]
    lengths = [CHUNK * (short // CHUNK + chunks) for chunks in (1, 2, 4)]
    given = None if by_default else lengths
    structure = walk(on_meta(case.model), [batch.inputs], name, parts, trains, given)
    set_trainable(case.model, trains)
    inputs = lengthened(batch.inputs, CHUNK * (short // CHUNK + 3) - short)
    forward, total = counted(case.model, inputs)
    rows, length = inputs["input_ids"].shape
    blocks = [
        block.of(length) if block.has_text else block.of(structure.visual_tokens)
        for block in structure.blocks
    ]
    numbers = [rows if block.has_text else 1 for block in structure.blocks]
    found = sum(n * x.forward for n, x in zip(numbers, blocks, strict=True))
    backward = sum(n * x.backward for n, x in zip(numbers, blocks, strict=True))
    assert abs(found / forward - 1) < 0.01
    assert abs((found + backward) / total - 1) < 0.01


@pytest.mark.parametrize("name", QUICK)
def test_a_step(name: str) -> None:
    check(name, ("projector", "llm"))


def test_the_lengths_of_a_walk_are_whole_chunks() -> None:
    """Of linear attention, whose products are no polynomial in between."""
    check("qwen3_5", ("projector", "llm"), by_default=True)


@pytest.mark.parametrize("trains", [("projector",), ("tower", "projector", "llm")])
def test_parts_that_train(trains: tuple[str, ...]) -> None:
    check("llava", trains)


def test_images_of_any_size() -> None:
    """Of Mistral 3, by two sizes: attention grows with the square. It was tiles of the largest,
    so that small images took as much a token as that."""
    config = copy.deepcopy(sample("mistral3").model.config)
    config.vision_config.image_size = 128
    torch.manual_seed(0)
    model: Any = type(sample("mistral3").model)(config)
    meta = on_meta(model)
    batches = made_up_batches(meta, resolve(meta).family)
    structure = walk(meta, batches, "mistral3", parts_of(model))
    assert structure.grows
    unit = config.vision_config.patch_size * config.spatial_merge_size
    for side in (2 * unit, 6 * unit, 128):
        pixels, counter = torch.ones(1, 3, side, side), FlopCounterMode(display=False)
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
            model.get_image_features(pixels, image_sizes=torch.tensor([[side, side]]))
        tokens = (side // unit) ** 2
        found = sum(b.of(tokens).forward for b in structure.blocks if not b.has_text)
        assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.matrix
@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_every_type(name: str) -> None:
    check(name, ("projector", "llm"))
