# SPDX-License-Identifier: Apache-2.0
"""The parts of each image-text type: who takes part in reading text, and what lies between."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from prereg_kernels.attach.resolver import find_family
from prereg_kernels.train.models import with_adapter
from prereg_kernels.train.parts import modules_of, parts_of, set_trainable
from tests.zoo import CASES, sample

REFUSED = {"git", "idefics", "mllama"}  # of which PRe knows no parts
# Its own tokens take the place of an image's: images do not pass a projector
NO_PROJECTOR = {"chameleon", "emu3", "inkling_mm_model"}
# It embeds words with its projectors, too
READS_WITH_PROJECTORS = {"gemma3n"}
# Whose projector or LLM has a name, or a place, of its own: the projector's modules, and what
# stands alone beside them
PROJECTORS: dict[str, tuple[set[str], set[str]]] = {
    "llava": ({"model.multi_modal_projector"}, set()),
    "llava_next": ({"model.multi_modal_projector"}, {"model.image_newline"}),
    "florence2": ({"model.multi_modal_projector"}, set()),
    "t5gemma2": ({"model.encoder.multi_modal_projector"}, set()),
    "blip-2+t5": ({"qformer", "language_projection"}, {"query_tokens"}),
    "qwen2_5_vl": ({"model.visual.merger"}, set()),
    "idefics2": (
        {"model.connector"},
        set(),
    ),
    "kosmos-2": ({"image_to_text_projection"}, set()),
    "lighton_ocr": ({"model.vision_projection"}, set()),
    "muse_glimmer": ({"model.vision_adapter", "model.vision_projection"}, set()),
    "hunyuan_vl": ({"model.vision_tower.patch_merger"}, set()),
    "ernie4_5_vl_moe": ({"model.resampler_model"}, set()),
    "janus": ({"model.aligner"}, set()),
    "gemma3n": ({"model.embed_vision"}, set()),
    "granite4_vision": (
        {f"model.layerwise_projectors.{i}" for i in range(2)}
        | {f"model.spatial_projectors.{i}" for i in range(4)},
        {"model.image_newline"},
    ),
    "phi4_multimodal": (
        {f"model.embed_tokens_extend.image_embed.img_projection_{x}" for x in ("up", "down")},
        {
            f"model.embed_tokens_extend.image_embed.{x}_img_feature_extensor"
            for x in ("global", "sub")
        },
    ),
}


def moved_by(model: nn.Module, inputs: dict[str, Any]) -> set[str]:
    """The parameters that have a gradient of the loss."""
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def check_by_gradients(name: str) -> None:
    """Text alone moves the LLM alone; what an image moves besides is not the LLM's."""
    case = sample(name)
    model, parts = case.model, parts_of(case.model)
    assert sorted(x for names in parts.values() for x in names) == sorted(
        x for x, _ in model.named_parameters()
    )
    model.requires_grad_(True)
    llm = set(parts["llm"])
    if "text only" in case.batches:
        text = moved_by(model, case.batches["text only"].inputs)
        if name not in READS_WITH_PROJECTORS:
            assert text <= llm, text - llm
        scene = next(scene for scene in ("images", "videos") if scene in case.batches)
        more = moved_by(model, case.batches[scene].inputs) - text
        # Which experts are chosen hangs on the batch
        assert not {x for x in more & llm if "expert" not in x and "moe" not in x}
    assert bool(parts["projector"]) == (name not in NO_PROJECTOR)
    family = find_family(model)
    if family.projector is not None:
        inside = {
            x
            for x in (n for n, _ in model.named_parameters())
            if x.startswith(f"{family.projector}.")
        }
        assert inside <= set(parts["projector"])


@pytest.mark.parametrize("name", PROJECTORS)
def test_parts(name: str) -> None:
    check_by_gradients(name)
    model = sample(name).model
    projector = parts_of(model)["projector"]
    modules, alone = PROJECTORS[name]
    assert set(modules_of(model, projector)) == modules
    inside = tuple(f"{module}." for module in modules)
    assert {x for x in projector if not x.startswith(inside)} == alone


@pytest.mark.matrix
@pytest.mark.parametrize("name", [x for x in CASES if x not in {*REFUSED, *PROJECTORS}])
def test_parts_of_every_type(name: str) -> None:
    check_by_gradients(name)


def test_the_decoder_of_text_trains_with_the_llm() -> None:
    """It writes the answers. It was left frozen, as a part of the tower."""
    model = sample("florence2").model
    set_trainable(model, ("llm",))
    decoder = model.model.language_model.decoder
    assert all(p.requires_grad for p in decoder.parameters())
    assert not any(p.requires_grad for p in model.model.vision_tower.parameters())


@pytest.mark.parametrize("name", ["florence2", "phi4_multimodal", "qwen2_5_vl"])
def test_an_adapter_is_on_the_llm_and_the_projector_trains_whole(name: str) -> None:
    model: Any = sample(name).model
    parts = parts_of(model)
    modules = tuple(f"{module}." for module in modules_of(model, parts["projector"]))
    whole = {x for x in parts["projector"] if x.startswith(modules)}
    peft = with_adapter(model, {"r": 2}, ("projector", "llm"))
    trains = {
        x.removeprefix("base_model.model.") for x, p in peft.named_parameters() if p.requires_grad
    }
    adapters = {x for x in trains if "lora_" in x}
    saved = {x.replace(".modules_to_save.default", "") for x in trains - adapters}
    assert saved == whole
    weights = {f"{x.partition('.lora_')[0]}.weight" for x in adapters}
    assert weights <= set(parts["llm"])
    if name == "florence2":
        assert any(".decoder." in x for x in weights) and any(".encoder." in x for x in weights)
