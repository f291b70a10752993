# SPDX-License-Identifier: Apache-2.0
"""Configs at reduced size: the same parts, each kind of layer, and numbers of layers that exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import CONFIG_MAPPING

from prereg_kernels.attach.resolver import resolve
from prereg_kernels.cli.reduced import EXPERTS, MLP, reduced
from tests.releases import HERE, is_here
from tests.zoo import sample
from tests.zoo.parts import CLASSES


def default(name: str) -> Any:
    """A type's config as it is built from its defaults."""
    config = CONFIG_MAPPING[name]()
    if HERE < (5, 0) and name.startswith("qwen3_vl"):  # whose classes read it, set or not
        config.text_config.rope_scaling = {"rope_type": "default", "mrope_section": [24, 20, 20]}
    return config


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return getattr(hf, CLASSES[config.model_type])(config)


@pytest.mark.parametrize(
    ("name", "layers", "most"),
    [case for case in (
        ("gemma4", 4, 1.0e9), ("kimi_k25", 4, 1.9e9), ("kosmos-2", 4, 0.3e9),
        ("llama4", 4, 2.6e9), ("qwen3_5_moe", 4, 1.3e9), ("qwen3_vl", 4, 1.8e9),
        ("t5gemma2", 2, 0.8e9), ("vipllava", 11, 1.2e9),
    ) if is_here(case[0])],
)  # fmt: skip
def test_the_parts_are_where_they_were(name: str, layers: int, most: float) -> None:
    whole, small = on_meta(default(name)), on_meta(reduced(default(name)))
    assert resolve(small).family == resolve(whole).family
    assert len(resolve(small).family.layers_of(small)) == layers
    assert sum(p.numel() for p in small.parameters()) < most
    words, small_words = (m.get_input_embeddings().weight.shape for m in (whole, small))
    assert words == small_words


def test_numbers_of_layers_are_those_of_the_layers_that_stay() -> None:
    config = CONFIG_MAPPING["qwen3_vl"]()
    config.vision_config.deepstack_visual_indexes = [8, 16, 24]
    small = reduced(config).vision_config
    assert (small.depth, small.deepstack_visual_indexes) == (4, [1, 2, 3])  # the first stays, too
    config.vision_config.deepstack_visual_indexes = [8]
    small = reduced(config).vision_config
    assert (small.depth, small.deepstack_visual_indexes) == (2, [1])


def test_each_kind_of_layer_stays() -> None:
    config = CONFIG_MAPPING["gemma3"]()
    kinds = config.text_config.layer_types
    assert kinds[:5] == ["sliding_attention"] * 5 and kinds[5] == "full_attention"
    assert reduced(config).text_config.layer_types == [*kinds[:3], kinds[5]]


def test_layers_by_name_of_another_part_stay() -> None:
    config = CONFIG_MAPPING["vipllava"]()
    assert tuple(config.vision_feature_layers) == (-2, -5, -8, -11, 6)
    assert reduced(config).vision_config.num_hidden_layers == 11
    assert reduced(CONFIG_MAPPING["llava"]()).vision_config.num_hidden_layers == 2


def test_experts_are_as_many_as_a_token_goes_to() -> None:
    config = CONFIG_MAPPING["qwen3_vl_moe"]()
    config.text_config.num_experts_per_tok = 12
    assert reduced(config).text_config.num_experts == 12
    config.text_config.num_experts_per_tok = 2
    small = reduced(config).text_config
    assert (small.num_experts, small.moe_intermediate_size) == (EXPERTS, MLP)
    assert small.hidden_size == config.text_config.hidden_size


def test_top_k_of_generation_is_no_number_of_experts() -> None:
    config = CONFIG_MAPPING["qwen3_vl_moe"]()
    config.text_config.top_k = 50  # as any config has it that a release before 5 wrote
    assert reduced(config).text_config.num_experts == EXPERTS


def test_what_is_small_stays() -> None:
    config = sample("llava").model.config
    assert reduced(config).to_dict() == config.to_dict()


def test_a_deep_model_runs_its_batch_once_it_is_small() -> None:
    """Features are added at several layers, and so has each of them to be there."""
    case = sample("qwen3_vl")
    values = case.model.config.to_dict()
    values["vision_config"] |= {"depth": 7, "deepstack_visual_indexes": [1, 3, 5]}
    values["text_config"] |= {"num_hidden_layers": 9}
    small = reduced(type(case.model.config).from_dict(values))
    assert small.vision_config.depth == 4 and small.text_config.num_hidden_layers == 4
    torch.manual_seed(0)
    batch = case.batches["images"].inputs
    loss = type(case.model)(small)(**batch).loss
    loss.backward()
    assert loss.isfinite()
