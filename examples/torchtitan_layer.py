# SPDX-License-Identifier: Apache-2.0
"""PRe in torchtitan: a tap inside of a layer of its own model, whose loss is outside.

`TapInLayer(model, ...)` is what you add, before the model is compiled, checkpointed and sharded, as
in a `parallelize_fn` of yours that calls torchtitan's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tiny_own import IMAGE, WIDTH, TitanModel, make_batch
from torch import Tensor, nn

from prereg_kernels import PReHead


class TapInLayer:
    """L_PRe of one layer's output, whose gradient backward adds.

    Attributes:
        denominator: of the step: its visual tokens, over all micro-batches and ranks, as
            torchtitan's `global_valid_tokens` are. Its FSDP adds gradients up, so no rank's share.
        value: L_PRe of the last backward pass, of this rank's tokens over the denominator.
    """

    def __init__(self, model: nn.Module, layer: str, width: int, weight: float = 0.5) -> None:
        self.weight, self.denominator, self.value = weight, torch.ones(()), torch.zeros(())
        self._mask = self._anchor = torch.zeros(())
        block, first = model.layers[layer], next(iter(model.layers.values()))
        block.pre_head = self.head = PReHead(width, width, seed=0)  # sharded with its layer
        model.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
        first.register_forward_pre_hook(self._see_features)
        block.register_forward_hook(self._tap)

    def _see_tokens(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._mask = args[0] == kwargs["special_tokens"]["image_id"]

    def _see_features(self, first: nn.Module, args: Any) -> None:
        self._anchor = args[0].detach()

    def _tap(self, block: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not block.training:
            return None
        self.value = self.value.to(output.device)
        tapped, _ = self.head.tap(
            output, self._anchor, visual_mask=self._mask, denominator=self.denominator,
            value_out=self.value, carry=self.weight, carry_always=True,
        )  # fmt: skip
        return tapped


def main() -> None:
    torch.manual_seed(0)
    model = TitanModel()
    pre = TapInLayer(model, "1", WIDTH)  # of the second layer
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(60):
        batches = [make_batch(2 * step + part) for part in range(2)]
        valid = sum((batch["labels"] != -100).sum() for batch in batches)
        pre.denominator = sum((batch["tokens"] == IMAGE).sum() for batch in batches)
        values.append(0.0)
        for batch in batches:
            logits = model(
                batch["tokens"], pixel_values=batch["pixel_values"],
                special_tokens={"image_id": IMAGE},
            )  # fmt: skip
            labels = batch["labels"].flatten()
            (F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / valid).backward()
            values[-1] += pre.value.item()
        optimizer.step()
        optimizer.zero_grad()
    print(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")


if __name__ == "__main__":
    main()
