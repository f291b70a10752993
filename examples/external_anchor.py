# SPDX-License-Identifier: Apache-2.0
"""PRe towards what another vision encoder sees: a frozen DINOv2, here a tiny one from a config.

If it wants other pixels than the model's, put them into a column of the batch that forward ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tiny import Collator, make_model, make_processor, make_samples
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Dinov2Config, Dinov2Model

from prereg_kernels import apply_pre  # PRe

GRID = 2  # LLaVA's image tokens a side, of 4 x 4 patches


def make_encoder() -> Dinov2Model:
    """In place of this, `Dinov2Model.from_pretrained(...)`, on the device of the batches."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    return Dinov2Model(Dinov2Config(image_size=16, **sizes)).eval().requires_grad_(False)


def main() -> None:
    encoder = make_encoder()

    def anchor(batch: Mapping[str, Any]) -> Tensor:
        """(N, A): a row for each image token, images in order, then rows, then columns."""
        pixels = batch.get("pixel_values")
        if pixels is None:  # text alone
            return torch.zeros(0, encoder.config.hidden_size, device=batch["input_ids"].device)
        patches = encoder(pixels).last_hidden_state[:, 1:]  # without the class token
        grid = patches.transpose(1, 2).unflatten(2, (int(patches.shape[1] ** 0.5), -1))
        return F.adaptive_avg_pool2d(grid, GRID).flatten(2).transpose(1, 2).flatten(0, 1)

    model = make_model().train()
    pre = apply_pre(model, anchor=anchor, anchor_features=encoder.config.hidden_size)  # PRe
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(make_samples(64), 8, shuffle=True, collate_fn=Collator(make_processor()))

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
