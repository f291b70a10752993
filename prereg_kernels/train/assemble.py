# SPDX-License-Identifier: Apache-2.0
"""`prereg assemble`: a LLaVA of a vision encoder and an LLM, before its first stage of training.

As LLaVA-1.5 (arXiv 2310.03744): the encoder's rows at its last layer but one, a projector of two
matrices, and the LLM. For SigLIP, whose encoder has no class token, all rows of its last layer.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from prereg_kernels._util.files import printable
from prereg_kernels._util.quiet import quiet
from prereg_kernels.train.names import check_name

IMAGE = "<image>"
TOWERS: dict[str, Any] = {
    "clip": (CLIPVisionModel, CLIPImageProcessor),
    "clip_vision_model": (CLIPVisionModel, CLIPImageProcessor),
    "siglip": (SiglipVisionModel, SiglipImageProcessor),
    "siglip_vision_model": (SiglipVisionModel, SiglipImageProcessor),
}
"""{model_type of a checkpoint: its vision encoder, its image processor}"""
# What an LLM without a template gets: Vicuna's, as LLaVA-1.5 is trained with it.
VICUNA = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}"
    "{%- set system = 'A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human\\'s questions.' -%}"
    "{%- endif -%}{{ bos_token or '' }}{{ system }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ ' USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{%- else -%}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{%- endif -%}{%- endfor -%}"
)
# Before any template: each message's parts become its text, as templates of LLMs expect it.
PARTS_TO_TEXT = (
    "{%- set chat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}"
    "{%- else -%}{%- set text -%}{%- for part in message['content'] -%}"
    "{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor -%}{%- endset -%}{%- endif -%}"
    "{%- set chat.messages = chat.messages + [dict(message, content=text)] -%}"
    "{%- endfor -%}{%- set messages = chat.messages -%}"
)


def assemble(vision: str, llm: str, out: Path, *, seed: int = 0) -> None:
    """Write the model, its processor and its chat template to `out`.

    The model has the LLM's dtype. Its template is the LLM's own, or Vicuna's where it has none.

    Args:
        vision: CLIP or SigLIP, whole or its vision model: a directory or a hub's name.
        llm: a decoder.
        seed: of the projector's weights.

    Raises:
        ValueError: other models, or a directory that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: expected a directory that is not there, or empty, got {out}")
    tower, images = _tower(vision)
    tokenizer, decoder = _decoder(llm)
    has_class_token = isinstance(tower, CLIPVisionModel)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2 if has_class_token else -1,
        vision_feature_select_strategy="default" if has_class_token else "full",
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=bool(decoder.config.tie_word_embeddings),
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(has_class_token),
        image_token=IMAGE,
        chat_template=PARTS_TO_TEXT + (tokenizer.chat_template or VICUNA),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector
    model.model.language_model = decoder.model
    model.lm_head = decoder.lm_head
    model.generation_config = decoder.generation_config
    model.to(decoder.dtype).save_pretrained(out)
    processor.save_pretrained(out)


def _tower(path: str) -> tuple[Any, Any]:
    """(vision encoder, image processor)."""
    check_name("--vision", path)
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind in TOWERS:
            model, images = TOWERS[kind]
            return model.from_pretrained(path, dtype="auto"), images.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--vision: {' '.join(str(error).split())}") from None
    raise ValueError(f"--vision: expected one of {', '.join(TOWERS)}, got {printable(kind)}")


def _decoder(path: str) -> tuple[Any, Any]:
    """(tokenizer, model), with rows for the image token."""
    check_name("--llm", path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        if "tiktoken" in reason and find_spec("sentencepiece") is None:  # it tries one, then other
            reason = "tokenizer.model: expected sentencepiece; pip install sentencepiece"
        raise ValueError(f"--llm: {reason}") from None
    if not isinstance(getattr(model, "lm_head", None), nn.Linear) or not hasattr(model, "model"):
        raise ValueError(f"--llm: expected a decoder with a head, got {type(model).__name__}")
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with quiet():  # of how the new rows are drawn
            model.resize_token_embeddings(len(tokenizer))
    return tokenizer, model
