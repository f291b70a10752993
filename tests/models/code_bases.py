# SPDX-License-Identifier: Apache-2.0
"""Stand-ins of code bases whose calls do not say which tokens are visual: NeMo's and Megatron's.

`MegatronVL` has the forward of Megatron-Bridge's `Qwen25VLModel` and of Megatron's `GPTModel` and
`TransformerBlock` below it: sequences come first, layers get keywords and return pairs, `forward`
is called past hooks, full recomputation is Megatron's own function. `NeMoVL` is a model of NeMo
AutoModel as its recipe calls it where the embeddings are made before: no ids, no labels, logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.original_cases import IMAGE, Batch, pictures, tokens
from tests.models.originals import PATCHES, SIZES, TOWER, WIDTH, Config, Original, Tower


class NeMoVL(Original):
    """Embeddings with the features in them, and kinds of tokens, come from outside."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model = LlamaForCausalLM(config.llm_config)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Any = None, mm_token_type_ids: Any = None
    ) -> Any:  # fmt: skip
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask)


class Recomputed(torch.autograd.Function):
    """Megatron's `CheckpointFunction`, without its generators."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        ctx.function = function
        with torch.no_grad():
            output = function(*args)
        ctx.save_for_backward(*args)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        detached = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.enable_grad():
            output = ctx.function(*detached)
        torch.autograd.backward([output], list(gradients))
        return (None, *(x.grad for x in detached))


class MegatronLayer(nn.Module):
    """(S, B, H), by keyword, to a pair; its attention is a mean over the tokens before."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, context: Any = None) -> tuple[Tensor, Any]:
        count = torch.arange(1, len(hidden_states) + 1)[:, None, None]
        hidden_states = hidden_states + self.mix(hidden_states.cumsum(dim=0) / count)
        return hidden_states + self.mlp(hidden_states).tanh(), context


class MegatronBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MegatronLayer() for _ in range(4)])
        self.final_layernorm = nn.LayerNorm(WIDTH)
        self.recomputes = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:

            def custom_forward(hidden_states: Tensor, layer: nn.Module = layer) -> Tensor:
                return layer(hidden_states=hidden_states)[0]

            if self.recomputes:
                hidden_states = Recomputed.apply(custom_forward, hidden_states)
            else:
                hidden_states = custom_forward(hidden_states)
        return self.final_layernorm(hidden_states)


class GPTModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.ModuleDict(
            {"word_embeddings": nn.Embedding(SIZES["vocab_size"], WIDTH)}
        )
        self.decoder = MegatronBlock()
        self.output_layer = nn.Linear(WIDTH, SIZES["vocab_size"], bias=False)

    def forward(self, input_ids: Any, decoder_input: Tensor, labels: Any = None) -> Tensor:
        hidden_states = self.decoder(hidden_states=decoder_input)
        logits = self.output_layer(hidden_states)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.transpose(0, 1).flatten(), reduction="none"
        )
        return losses.view(len(logits), -1).transpose(0, 1)  # a loss of each token


class MegatronVL(Original):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.visual, self.merger = Tower(), nn.Linear(TOWER, WIDTH)
        self.language_model = GPTModel()

    def get_input_embeddings(self) -> nn.Module:
        """Not in the original: the lines that the page has for it."""
        return self.language_model.embedding["word_embeddings"]

    def gradient_checkpointing_enable(self, *_: Any) -> None:
        self.language_model.decoder.recomputes = True

    def gradient_checkpointing_disable(self) -> None:
        self.language_model.decoder.recomputes = False

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, attention_mask: Any = None,
        pixel_values: Any = None, labels: Any = None,
    ) -> Any:  # fmt: skip
        embeddings = self.language_model.embedding["word_embeddings"](input_ids)
        if pixel_values is not None:
            features = self.merger(self.visual(pixel_values)).flatten(0, 1)
            embeddings = embeddings.masked_scatter((input_ids == IMAGE)[..., None], features)
        embeddings = embeddings.transpose(1, 0)
        return self.language_model.forward(input_ids=None, decoder_input=embeddings, labels=labels)


def nemo_model() -> Any:
    return NeMoVL(Config(llm_config=LlamaConfig(**SIZES)))


def nemo_batch(scene: str, side: str, model: Any) -> Batch:
    """The features are drawn: whatever makes them, they come as embeddings."""
    t = tokens(scene, lambda _: [IMAGE] * PATCHES, side, {IMAGE: 1})
    embeddings = model.get_input_embeddings()(t.ids).detach()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(embeddings.shape, generator=generator)
    inputs = {
        "inputs_embeds": torch.where(t.visual[..., None], drawn, embeddings),
        "attention_mask": t.attention, "mm_token_type_ids": t.visual.long(), "labels": t.labels,
    }  # fmt: skip
    return Batch(inputs, t.visual)


def megatron_model() -> Any:
    return MegatronVL(Config())


def megatron_batch(scene: str, side: str, model: Any) -> Batch:
    t = tokens(scene, lambda _: [IMAGE] * PATCHES, side, {IMAGE: 1})
    inputs: dict[str, Any] = {"input_ids": t.ids, "labels": t.labels}
    if t.visual.any():
        inputs["pixel_values"] = torch.cat(pictures(scene))
    return Batch(inputs, t.visual)
