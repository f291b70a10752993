# SPDX-License-Identifier: Apache-2.0
"""Models outside of transformers: the forward of their authors' code, tiny.

Names of arguments, and which module is called how, are those of the original; towers and
projectors are not. Each image has `PATCHES` tokens, but for DeepSeek-VL2's tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

WIDTH, TOWER, PATCHES, LIMIT = 24, 16, 4, 32
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


class Tower(nn.Module):
    """(n, 3, 16, 16) -> (n, 4, 16)."""

    num_patches = PATCHES

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, TOWER, 8, 8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.patches(pixel_values).flatten(2).transpose(1, 2)


class Config(PretrainedConfig):
    """With the parts that are given."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        vars(self).update(parts)


class Original(PreTrainedModel):
    """What the models share: nothing of where they keep their parts."""

    supports_gradient_checkpointing = True
    config_class = Config


class InternVLChatModel(Original):
    """InternVL 1.5 to 3: features are written into a reshaped copy of the embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_model, self.mlp1 = Tower(), nn.Linear(TOWER, WIDTH)
        self.language_model = Qwen2ForCausalLM(config.llm_config)
        self.img_context_token_id: int | None = None  # set after loading, from the tokenizer

    def forward(
        self, pixel_values: Any, input_ids: Any = None, attention_mask: Any = None,
        image_flags: Any = None, labels: Any = None,
    ) -> Any:  # fmt: skip
        image_flags = image_flags.squeeze(-1)
        input_embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        vit_embeds = self.mlp1(self.vision_model(pixel_values))
        vit_embeds = vit_embeds[image_flags == 1]
        B, N, C = input_embeds.shape
        input_embeds = input_embeds.reshape(B * N, C)
        selected = input_ids.reshape(B * N) == self.img_context_token_id
        input_embeds[selected] = input_embeds[selected] * 0.0 + vit_embeds.reshape(-1, C)
        input_embeds = input_embeds.reshape(B, N, C)
        outputs = self.language_model(inputs_embeds=input_embeds, attention_mask=attention_mask)
        loss = None
        if labels is not None:
            logits = outputs.logits[..., :-1, :].reshape(-1, outputs.logits.shape[-1])
            loss = nn.functional.cross_entropy(logits, labels[..., 1:].reshape(-1))
        return CausalLMOutputWithPast(loss=loss, logits=outputs.logits)


class MiniCPMV(Original):
    """MiniCPM-V 2.x: one argument with all in it; some LLMs scale the embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.llm = LlamaForCausalLM(config.llm_config)
        self.vpm, self.resampler = Tower(), nn.Linear(TOWER, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    def get_decoder(self) -> nn.Module:
        return self.llm

    def get_vllm_embedding(self, data: Mapping[str, Any]) -> Tensor:
        images = [pixels for row in data["pixel_values"] for pixels in row]
        states = self.resampler(self.vpm(torch.stack(images or [torch.zeros(3, 16, 16)])))
        embedding = self.llm.model.embed_tokens(data["input_ids"])
        if hasattr(self.llm.config, "scale_emb"):
            embedding = embedding * self.llm.config.scale_emb
        start = 0
        for i, pixels in enumerate(data["pixel_values"]):
            current, bounds = embedding[i], data["image_bound"][i]
            if len(bounds) > 0:
                indices = torch.stack([torch.arange(r[0], r[1]) for r in bounds]).view(-1, 1)
                rows = states[start : start + len(pixels)].reshape(-1, WIDTH)
                current.scatter_(0, indices.repeat(1, current.shape[-1]), rows)
                start += len(pixels)
            elif self.training:
                current += states[0].mean() * 0
        return embedding

    def forward(self, data: Mapping[str, Any], **kwargs: Any) -> Any:
        embedding = self.get_vllm_embedding(data)
        position_ids = data["position_ids"].long()
        return self.llm(
            input_ids=None, position_ids=position_ids, inputs_embeds=embedding, **kwargs
        )


class DeepseekVLV2ForCausalLM(Original):
    """DeepSeek-VL2: a global view and tiles, with newlines; the LLM's forward is called itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision, self.projector = Tower(), nn.Linear(TOWER, WIDTH)
        self.language = LlamaForCausalLM(config.language_config)
        self.image_newline = nn.Parameter(torch.randn(WIDTH))
        self.view_seperator = nn.Parameter(torch.randn(WIDTH))

    def prepare_inputs_embeds(
        self, input_ids: Tensor, images: Any, images_seq_mask: Any, images_spatial_crop: Any
    ) -> Tensor:
        if images is None or images_spatial_crop.sum() == 0:
            return self.language.get_input_embeddings()(input_ids)
        shown = [[w * h for w, h in row.tolist() if w * h] for row in images_spatial_crop]
        tiles = torch.cat([x[: sum(row) + len(row)] for x, row in zip(images, shown, strict=True)])
        features = self.projector(self.vision(tiles))
        input_embeds = self.language.get_input_embeddings()(input_ids)
        index = 0
        for idx, row in enumerate(shown):
            parts: list[Tensor] = []
            for count in row:
                views = features[index : index + 1 + count].view(-1, 2, 2, WIDTH)
                newlines = self.image_newline.expand(len(views), 2, 1, WIDTH)
                views = torch.cat([views, newlines], dim=2).flatten(1, 2)
                parts += [views[0], self.view_seperator[None], *views[1:]]
                index += 1 + count
            if parts:
                mask = images_seq_mask[idx].unsqueeze(-1)
                input_embeds[idx].masked_scatter_(mask, torch.cat(parts))
        return input_embeds

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, inputs_embeds: Any = None, images: Any = None,
        images_seq_mask: Any = None, images_spatial_crop: Any = None, labels: Any = None,
        use_cache: Any = None,
    ) -> Any:  # fmt: skip
        if inputs_embeds is None:
            inputs_embeds = self.prepare_inputs_embeds(
                input_ids, images, images_seq_mask, images_spatial_crop
            )
        return self.language.forward(
            input_ids=None, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels,
            use_cache=use_cache,
        )  # fmt: skip


class VisualTokenizer(nn.Module):
    """Ovis's: to each patch a distribution over words of its own."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.tower, self.head = Tower(), nn.Linear(TOWER, words - 5, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.head(self.tower(pixel_values)).softmax(dim=-1)
        return nn.functional.pad(tokens, (0, 5))  # the indicators' words


class Ovis(Original):
    """Ovis 1.6: -300 becomes the rows of an image; in training, all is padded to a length."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config.llm_config)
        self.visual_tokenizer = VisualTokenizer(12)
        self.vte = nn.Linear(12, WIDTH, bias=False)  # soft words, or one-hot

    def get_wte(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Any, pixel_values: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        embeds, labels, attention_mask = self.merge_multimodal(
            input_ids, attention_mask, labels, pixel_values
        )
        return self.llm(
            inputs_embeds=embeds, labels=labels, attention_mask=attention_mask, **kwargs
        )

    def merge_multimodal(self, ids: Tensor, masks: Tensor, targets: Tensor, pixels: Any) -> Any:
        indicators = self.vte(torch.eye(12)[-5:])
        counts = [x.shape[0] for x in pixels]
        visual = self.vte(self.visual_tokenizer(torch.cat(pixels))).split(counts)
        merged: list[list[Tensor]] = [[], [], []]
        for row, mask, target, images in zip(ids, masks, targets, visual, strict=True):
            text = self.get_wte()(row.masked_fill(row < 0, 0))
            for i in range(5):
                text[row == -301 - i] = indicators[i]
            atoms = torch.where(row == -300)[0].tolist()
            if not atoms:
                text += (images * 0.0).sum() + (indicators * 0.0).sum()
            parts: list[list[Tensor]] = [[], [], []]
            begin = 0
            for index, atom in enumerate([*atoms, len(row)]):
                for part, of_text in zip(parts, (text, mask, target), strict=True):
                    part.append(of_text[begin:atom])
                if atom < len(row):
                    parts[0].append(images[index])
                    parts[1].append(torch.ones(PATCHES, dtype=torch.bool))
                    parts[2].append(torch.full((PATCHES,), -100))
                begin = atom + 1
            for all_of, part in zip(merged, parts, strict=True):
                all_of.append(torch.cat(part))
        limit, fills = self.config.multimodal_max_length, (0.0, False, -100)
        if self.training:
            for all_of, fill in zip(merged, fills, strict=True):
                first = all_of[0]
                more = first.new_full((max(0, limit - len(first)), *first.shape[1:]), fill)
                all_of[0] = torch.cat([first, more])
        embeds, masks, targets = (
            pad_sequence(all_of, batch_first=True, padding_value=fill)[:, :limit]
            for all_of, fill in zip(merged, fills, strict=True)
        )
        return embeds, targets, masks


class LlavaLlamaModel(LlamaModel):
    """The decoder, with the tower and the projector in it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower, self.mm_projector = Tower(), nn.Linear(TOWER, WIDTH)


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """haotian-liu's LLaVA: -200 becomes the rows of an image; padding is cut off and put anew."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlavaLlamaModel(config)
        self.post_init()

    def get_vision_tower(self) -> nn.Module:
        return self.model.vision_tower

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
        past_key_values: Any = None, inputs_embeds: Any = None, labels: Any = None,
        use_cache: Any = None, images: Any = None, image_sizes: Any = None,
    ) -> Any:  # fmt: skip
        if inputs_embeds is None and images is not None:
            attention_mask, inputs_embeds, labels = self.prepare_inputs_labels_for_multimodal(
                input_ids, attention_mask, labels, images
            )
            input_ids = None
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels,
            use_cache=use_cache,
        )  # fmt: skip

    def prepare_inputs_labels_for_multimodal(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Any, images: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        features = self.model.mm_projector(self.get_vision_tower()(images))
        given = labels
        labels = torch.full_like(input_ids, -100) if labels is None else labels
        shown = attention_mask.bool()
        embeds, targets, image = [], [], 0
        for ids, label in zip(
            [x[m] for x, m in zip(input_ids, shown, strict=True)],
            [x[m] for x, m in zip(labels, shown, strict=True)],
            strict=True,
        ):
            places = [-1, *torch.where(ids == -200)[0].tolist(), len(ids)]
            sizes = [b - a - 1 for a, b in pairwise(places)]
            text = self.model.embed_tokens(ids[ids != -200]).split(sizes)
            words = label[ids != -200].split(sizes)
            row, target = [text[0]], [words[0]]
            if len(places) == 2:  # a row of text has an image, too, of which it takes nothing
                row.append(features[image][:0])
                image += 1
            for part, word in zip(text[1:], words[1:], strict=True):
                row += [features[image], part]
                target += [torch.full((PATCHES,), -100), word]
                image += 1
            embeds.append(torch.cat(row)[: self.config.tokenizer_model_max_length])
            targets.append(torch.cat(target)[: self.config.tokenizer_model_max_length])
        side = self.config.tokenizer_padding_side
        lengths = [torch.ones(len(x), dtype=attention_mask.dtype) for x in embeds]
        return (
            pad_sequence(lengths, batch_first=True, padding_side=side),
            pad_sequence(embeds, batch_first=True, padding_side=side),
            None if given is None
            else pad_sequence(targets, batch_first=True, padding_value=-100, padding_side=side),
        )  # fmt: skip
