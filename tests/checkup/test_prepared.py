# SPDX-License-Identifier: Apache-2.0
"""What prepares a model's inputs, where its directory does not say all; two that are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prereg_kernels.checkup.images.image_batches import _surroundings, check_same_inputs
from prereg_kernels.checkup.images.processing import place
from prereg_kernels.checkup.loading import prepare
from tests.checkup.pictures import noise, save_model, save_tokenizer

CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALVES = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
RELEASES = {
    "llava": ("CLIPImageProcessor", CLIP, None),
    "llava_next": ("LlavaNextImageProcessor", CLIP, None),
    "qwen2_vl": ("Qwen2VLImageProcessor", CLIP, (3136, 12845056)),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", CLIP, (3136, 12845056)),
    "qwen3_vl": ("Qwen2VLImageProcessor", HALVES, (65536, 16777216)),
}
"""The preprocessor_config.json of the families' releases: class, mean and deviation, pixels."""


@pytest.mark.parametrize("family", RELEASES)
def test_the_usual_processor_is_that_of_the_release(family: str, tmp_path: Path) -> None:
    """Qwen3-VL had CLIP's mean and deviation, and LLaVA-NeXT's images were in no tiles."""
    prepared = prepare(save_model(tmp_path, family, processor=False))
    kind, (mean, deviation), pixels = RELEASES[family]
    processor = prepared.processor
    assert type(processor).__name__.removesuffix("Pil") == kind
    assert list(processor.image_mean) == mean and list(processor.image_std) == deviation
    if pixels is not None:
        size = processor.size
        assert (size["shortest_edge"], size["longest_edge"]) == pixels
    [note] = [note for note in prepared.notes if "usual" in note]
    said = f"image_mean {processor.image_mean}, image_std {processor.image_std})"
    assert said in note
    _, made = place(prepared.config, processor, noise(40, 60))
    assert ("image_sizes" in made) == (family == "llava_next")


@pytest.mark.parametrize("content", ({"chat_template": "hello <image> bye"}, {}, []))
def test_a_chat_template_in_the_file_of_old(content: Any, tmp_path: Path) -> None:
    """LLaVA-1.5's is in a file of its processor's; the images were put in without its words."""
    directory = save_model(tmp_path)
    save_tokenizer(directory, "hello <image> bye")
    with_template = _surroundings(prepare(directory))
    (directory / "chat_template.jinja").unlink()
    without = prepare(directory)
    assert any("There is no chat template" in note for note in without.notes)
    assert _surroundings(without) != with_template
    (directory / "chat_template.json").write_text(json.dumps(content))
    if content == {"chat_template": "hello <image> bye"}:
        prepared = prepare(directory)
        assert _surroundings(prepared) == with_template
        assert not any("chat template" in note for note in prepared.notes)
        return
    with pytest.raises(ValueError, match=r"chat_template\.json: expected an object with a chat_t"):
        prepare(directory)


def test_models_with_other_inputs_are_not_compared(tmp_path: Path) -> None:
    """Equal weights had clearly other numbers: of a mean and deviation of their own."""
    first = save_model(tmp_path / "a", "qwen3_vl")
    second = save_model(tmp_path / "b", "qwen3_vl", processor=False)
    names = ["a", "b"]
    with pytest.raises(ValueError, match=r"^compare: .* same image processor, got .* of a and b; "):
        check_same_inputs(names, [prepare(first), prepare(second)])
    check_same_inputs(names, [prepare(first), prepare(second, first)])
    save_tokenizer(first, "hello <image> bye")
    with pytest.raises(
        ValueError, match=r"tokens before an image; those of a, 1, and of b, 1, differ"
    ):
        check_same_inputs(names, [prepare(first), prepare(second, first)])
    save_tokenizer(second, "hello <image> look look")  # what stands behind an image, it cannot see
    check_same_inputs(names, [prepare(first), prepare(second, first)])
