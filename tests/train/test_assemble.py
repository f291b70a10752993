# SPDX-License-Identifier: Apache-2.0
"""`prereg assemble`: the parts' own weights, in a model that plain transformers reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    SiglipVisionModel,
)
from transformers.utils import logging

from prereg_kernels.train.assemble import IMAGE, assemble
from tests.train.models import (
    make_clip,
    make_llama,
    make_llama3,
    make_qwen,
    make_siglip,
    make_siglip2,
    make_vicuna,
    make_whole_clip,
)
from tests.trainers.test_checkpoints import warnings_of

TOWERS = {
    "clip": (make_clip, CLIPVisionModel),
    "whole clip": (make_whole_clip, CLIPVisionModel),
    "siglip": (make_siglip, SiglipVisionModel),
    "siglip2": (make_siglip2, SiglipVisionModel),
}
DECODERS = {"vicuna": make_vicuna, "llama3": make_llama3, "qwen2.5": make_qwen}
PAIRS = [  # each vision encoder with two LLMs or more
    ("clip", "vicuna"), ("clip", "llama3"), ("clip", "qwen2.5"), ("whole clip", "vicuna"),
    ("whole clip", "llama3"), ("siglip", "llama3"), ("siglip", "qwen2.5"), ("siglip2", "vicuna"),
    ("siglip2", "qwen2.5"),
]  # fmt: skip


@pytest.mark.parametrize(("tower", "decoder"), PAIRS)
def test_the_parts_are_what_they_were(tmp_path: Path, tower: str, decoder: str) -> None:
    make, kind = TOWERS[tower]
    vision, llm = make(tmp_path / "vision"), DECODERS[decoder](tmp_path / "llm")
    assemble(str(vision), str(llm), tmp_path / "out")
    model, notes = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = model.model.vision_tower.state_dict()
    before = AutoModelForCausalLM.from_pretrained(llm, dtype="auto")
    assert model.dtype == before.dtype
    expected = kind.from_pretrained(vision).to(before.dtype).state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], x) for name, x in expected.items())
    rows = before.get_input_embeddings().num_embeddings
    for name, x in before.model.state_dict().items():
        after = model.model.language_model.state_dict()[name]
        assert torch.equal(after[:rows] if name == "embed_tokens.weight" else after, x), name
    assert torch.equal(model.lm_head.weight[:rows], before.lm_head.weight)
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert is_tied == (decoder == "qwen2.5")


@pytest.mark.parametrize(("tower", "decoder"), PAIRS)
def test_it_sees(tmp_path: Path, tower: str, decoder: str) -> None:
    """A token for each patch, other logits for another picture; of CLIP its last layer but one."""
    assemble(
        str(TOWERS[tower][0](tmp_path / "vision")), str(DECODERS[decoder](tmp_path / "llm")),
        tmp_path / "out",
    )  # fmt: skip
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text.count(f"{IMAGE}\nHi?") == 1
    seen = list[torch.Tensor]()
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    logits = []
    for colour in ("red", "blue"):
        batch = processor(text=text, images=Image.new("RGB", (20, 16), colour), return_tensors="pt")
        assert (batch["input_ids"] == model.config.image_token_id).sum() == 4
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits)
            states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
        rows = states.hidden_states[-2][:, 1:] if "clip" in tower else states.hidden_states[-1]
        assert torch.equal(seen[-1].reshape(rows.shape), rows)
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_the_llm_s_dtype_and_a_seed(tmp_path: Path) -> None:
    vision, llm = make_clip(tmp_path / "vision"), make_llama(tmp_path / "llm", torch.bfloat16)
    weights = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(weights)}"
        assemble(str(vision), str(llm), out, seed=seed)
        model = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        weights.append(model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("vision", "llm", "message"),
    [
        (make_llama, make_llama, "--vision: expected one of clip, .*got llama"),
        (make_clip, make_clip, "--llm: "),
        (make_clip, lambda path: path / "absent", "--llm: "),
    ],
)
def test_other_models_are_an_error(
    tmp_path: Path, vision: Callable[[Path], Path], llm: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(str(vision(tmp_path / "a")), str(llm(tmp_path / "b")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Vicuna's on the hub; transformers names another package where it is missing."""
    clip, llm = make_clip(tmp_path / "clip"), make_vicuna(tmp_path / "llm")
    (llm / "tokenizer.json").unlink()
    (llm / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setattr("prereg_kernels.train.assemble.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--llm: tokenizer\.model: .*pip install sentencepiece"):
        assemble(str(clip), str(llm), tmp_path / "out")


def test_a_full_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="--out: expected a directory that is not there"):
        assemble("vision", "llm", tmp_path)


def test_it_says_nothing_of_new_rows(tmp_path: Path) -> None:
    """transformers tells how it draws them, as advice to who calls it."""
    logging.warning_once.cache_clear()
    vision, llm = make_clip(tmp_path / "vision"), make_vicuna(tmp_path / "llm")
    with warnings_of("transformers.modeling_utils") as said:
        assemble(str(vision), str(llm), tmp_path / "out")
    assert not said
