# SPDX-License-Identifier: Apache-2.0
"""What two examples train: decoders with the forward of torchtitan's and of Megatron's models.

In place of these, take the code base's own model. Neither is transformers', and neither has a loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE, PATCHES, WORDS, WIDTH, LENGTH = 1, 4, 12, 32, 10


class Block(nn.Module):
    """A layer on (B, S, D): each position sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device)
        x = x + self.mix(x.cumsum(dim=1) / count[:, None])
        return x + self.mlp(x).tanh()


class TitanModel(nn.Module):
    """`tokens` to logits, as torchtitan's Qwen3.5: layers in a dictionary, features by position."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(WORDS, WIDTH)
        self.vision_encoder = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleDict({str(number): Block() for number in range(4)})
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(
        self, tokens: Tensor, *, pixel_values: Tensor, special_tokens: dict[str, int]
    ) -> Tensor:
        x = self.tok_embeddings(tokens)
        is_image = (tokens == special_tokens["image_id"])[..., None]
        x = x.masked_scatter(is_image, self.vision_encoder(pixel_values))
        for layer in self.layers.values():
            x = layer(x, None, None)
        return self.lm_head(x)


class Position(nn.Linear):
    """A layer on any shape: each position sees itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x).tanh()


class MegatronModel(nn.Module):
    """`input_ids` (B, S) to logits (S, B, V), as Megatron-Bridge's Qwen2.5-VL.

    With `ranks`, the positions are split over a sequence-parallel group's; the layers here work on
    a position alone then.
    """

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.embedding, self.visual = nn.Embedding(WORDS, WIDTH), nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList([Position(WIDTH, WIDTH) for _ in range(4)])
        self.output_layer = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x.masked_scatter((input_ids == IMAGE)[..., None], self.visual(pixel_values))
        x = x.transpose(0, 1).contiguous()  # (S, B, D)
        x = x.chunk(self.ranks, dim=0)[self.rank]
        for layer in self.layers:
            x = layer(x)
        return self.output_layer(x)


def make_batch(seed: int, rows: int = 4) -> dict[str, Tensor]:
    """Rows of one image or two and an answer: {"tokens", "labels", "pixel_values"}."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, WORDS, (rows, LENGTH), generator=generator)
    for row, count in zip(tokens, torch.randint(1, 3, (rows,), generator=generator), strict=True):
        row[: int(count) * PATCHES] = IMAGE
    labels = tokens.roll(-1, dims=1).masked_fill(tokens.roll(-1, dims=1) == IMAGE, -100)
    visual = int((tokens == IMAGE).sum())
    pixels = torch.randn(visual, 8, generator=generator) + 1
    return {"tokens": tokens, "labels": labels, "pixel_values": pixels}
