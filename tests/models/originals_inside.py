# SPDX-License-Identifier: Apache-2.0
"""Models outside of transformers whose decoder itself merges the features; see `originals`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.models.originals import TOWER, WIDTH, Original, Tower


class Phi3ImageEmbedding(nn.Module):
    """Puts features in place of negative ids: -1 for the first image's, -2 for the second's."""

    def __init__(self, wte: nn.Module) -> None:
        super().__init__()
        self.wte, self.img_processor = wte, Tower()
        self.img_projection = nn.Linear(TOWER, WIDTH)

    def forward(self, input_ids: Tensor, pixel_values: Any, image_sizes: Any) -> Tensor:
        positions = torch.nonzero((input_ids < 0) & (input_ids > -1000000000), as_tuple=True)
        hidden_states = self.wte(input_ids.clamp_min(0))
        if len(positions[0].tolist()) > 0:
            features = self.img_projection(self.img_processor(pixel_values)).flatten(0, 1)
            hidden_states = hidden_states.index_put(positions, features, accumulate=False)
        return hidden_states


class Phi3VModel(LlamaModel):
    """The decoder, which takes pixels."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_embed_tokens = Phi3ImageEmbedding(self.embed_tokens)

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, inputs_embeds: Any = None, pixel_values: Any = None,
        image_sizes: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if inputs_embeds is None:
            if pixel_values is not None and image_sizes is not None:
                inputs_embeds = self.vision_embed_tokens(input_ids, pixel_values, image_sizes)
            else:
                inputs_embeds = self.embed_tokens(input_ids)
        return super().forward(
            attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip


class Phi3VForCausalLM(LlamaForCausalLM):
    """Phi-3.5-vision: passes all that it gets to its decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.post_init()

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, inputs_embeds: Any = None, pixel_values: Any = None,
        image_sizes: Any = None, labels: Any = None, use_cache: Any = None,
    ) -> Any:  # fmt: skip
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            pixel_values=pixel_values, image_sizes=image_sizes, use_cache=use_cache,
        )  # fmt: skip
        return _with_loss(self.lm_head(outputs[0]), labels)


class MolmoEmbedding(nn.Module):
    """Two tables, one after the other."""

    def __init__(self, words: int, new_words: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(words, WIDTH))
        self.new_embedding = nn.Parameter(torch.randn(new_words, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x, torch.cat([self.embedding, self.new_embedding], dim=0))


class MolmoBlock(nn.Module):
    """Returns a cache beside its states."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.att_proj, self.attn_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ff_proj, self.ff_out = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor, attention_bias: Any = None) -> tuple[Tensor, None]:
        q, k, v = self.att_proj(self.attn_norm(x)).chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias)
        x = x + self.attn_out(attended)
        return x + self.ff_out(nn.functional.silu(self.ff_proj(self.ff_norm(x)))), None


class Molmo(nn.Module):
    """The decoder: adds features to the rows that `image_input_idx` names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_backbone = nn.Sequential(Tower(), nn.Linear(TOWER, WIDTH))
        self.gradient_checkpointing = False
        self.transformer = nn.ModuleDict({
            "wte": MolmoEmbedding(config.vocab_size - 4, 4),
            "blocks": nn.ModuleList([MolmoBlock() for _ in range(4)]),
            "ln_f": nn.LayerNorm(WIDTH), "ff_out": nn.Linear(WIDTH, config.vocab_size),
        })  # fmt: skip

    def forward(
        self, input_ids: Tensor, attention_mask: Any, images: Any, image_input_idx: Any
    ) -> Tensor:
        input_ids = input_ids * (input_ids != -1).to(input_ids.dtype)
        batch_size, seq_len = input_ids.shape
        x = self.transformer.wte(input_ids)
        if images is not None:
            num_image = images.shape[1]
            image_features = self.vision_backbone(images.flatten(0, 1))
            image_features = image_features.view(batch_size, num_image * 4, -1)
            image_input_idx = image_input_idx.view(batch_size, num_image * 4)
            valid = image_input_idx >= 0
            batch_idx = torch.arange(batch_size)[:, None].tile(1, num_image * 4)
            x[batch_idx[valid], image_input_idx[valid]] += image_features[valid]
        bias = torch.ones(seq_len, seq_len).tril().bool() & attention_mask.bool()[:, None]
        bias = torch.where(bias | torch.eye(seq_len).bool(), 0.0, torch.finfo(x.dtype).min)
        for block in self.transformer.blocks:
            if self.gradient_checkpointing:
                x, _ = checkpoint(block, x, attention_bias=bias, use_reentrant=False)
            else:
                x, _ = block(x, attention_bias=bias)
        return self.transformer.ff_out(self.transformer.ln_f(x))


class MolmoForCausalLM(Original):
    """Molmo 1: calls its decoder's forward itself, past the hooks on it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Molmo(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def gradient_checkpointing_enable(self, *_: Any) -> None:
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing = False

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, images: Any = None,
        image_masks: Any = None, image_input_idx: Any = None, labels: Any = None,
    ) -> Any:  # fmt: skip
        logits = self.model.forward(
            input_ids=input_ids, attention_mask=attention_mask, images=images,
            image_input_idx=image_input_idx,
        )  # fmt: skip
        return _with_loss(logits, labels)


def _with_loss(logits: Tensor, labels: Any) -> CausalLMOutputWithPast:
    loss = None
    if labels is not None:
        shifted = logits[..., :-1, :].reshape(-1, logits.shape[-1])
        loss = nn.functional.cross_entropy(shifted, labels[..., 1:].reshape(-1))
    return CausalLMOutputWithPast(loss=loss, logits=logits)
