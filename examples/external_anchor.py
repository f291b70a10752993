# SPDX-License-Identifier: Apache-2.0
"""PRe towards what another vision encoder sees: a frozen DINOv2, here a tiny one from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tiny import Collator, make_model, make_processor, make_samples
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model

from prereg_kernels import apply_pre

GRID = 2  # LLaVA's image tokens a side


def make_encoder() -> Dinov2Model:
    """In place of this, `Dinov2Model.from_pretrained(...)`, on the device of the batches."""
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    return Dinov2Model(config).eval().requires_grad_(False)


def main() -> None:
    encoder = make_encoder()

    def anchor(batch: Mapping[str, Any]) -> Tensor:
        """(N, A): a row for each image token, images in order, then rows, then columns.

        An encoder that wants other pixels than the model's takes them from another column of the
        batch, which the model's forward has to ignore.
        """
        pixels = batch.get("pixel_values")
        if pixels is None:  # text alone
            return torch.zeros(0, encoder.config.hidden_size, device=batch["input_ids"].device)
        patches = encoder(pixels).last_hidden_state[:, 1:]  # without the class token
        side = int(patches.shape[1] ** 0.5)
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        grid = F.adaptive_avg_pool2d(grid, GRID)  # from its 4 x 4 patches to the model's 2 x 2
        return grid.flatten(2).transpose(1, 2).flatten(0, 1)

    model = make_model().train()
    pre = apply_pre(model, anchor=anchor, anchor_features=encoder.config.hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = Collator(make_processor())
    loader = DataLoader(make_samples(64), batch_size=8, shuffle=True, collate_fn=collate)

    values = []
    for _ in range(3):
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(pre.metrics()["pre_loss"])
    print(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")


if __name__ == "__main__":
    main()
