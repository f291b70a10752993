# SPDX-License-Identifier: Apache-2.0
"""PRe in Megatron-Bridge: a tap on (S, B, H) states, which may be scattered over ranks.

`TapInLayer(model, layer)` is what you add, before Megatron wraps the model in its DDP. With
sequence parallelism each rank has some positions of all sequences, and taps its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tiny_own import IMAGE, WIDTH, MegatronModel, make_batch
from torch import Tensor, nn

from prereg_kernels import PReHead


class TapInLayer:
    """L_PRe of one layer's output, whose gradient backward adds.

    Args:
        first, layer: the decoder's first layer, and the one that is regularised.
        width, image_id: of the states; the id in `input_ids` that stands for an image's rows.
        rank, ranks: of the tensor-parallel group, with sequence parallelism; else 0 and 1.

    Attributes:
        scale: what the loss of a micro-batch is multiplied by: 1 / num_microbatches, and the
            factor of `grad_scale_func`, if there is one.
        value: L_PRe of the last backward pass, this rank's part of it.
    """

    def __init__(
        self, model: nn.Module, first: nn.Module, layer: nn.Module, width: int, image_id: int,
        weight: float = 0.5, rank: int = 0, ranks: int = 1,
    ) -> None:  # fmt: skip
        self.weight, self.scale, self.value = weight, 1.0, torch.zeros(())
        self.image_id, self.rank, self.ranks = image_id, rank, ranks
        self._mask = self._anchor = torch.zeros(())
        layer.pre_head = self.head = PReHead(width, width, seed=0)
        for parameter in self.head.parameters():  # Megatron adds its gradients up over the group
            parameter.sequence_parallel = ranks > 1
        model.register_forward_pre_hook(self._see_ids, with_kwargs=True)
        first.register_forward_pre_hook(self._see_features, with_kwargs=True)
        layer.register_forward_hook(self._tap)

    def _see_ids(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._mask = kwargs["input_ids"] == self.image_id  # (B, S), all positions

    def _see_features(self, first: nn.Module, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        self._anchor = states.detach()  # (S / ranks, B, H)

    def _tap(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if not layer.training:
            return None
        states = output[0] if isinstance(output, tuple) else output
        self.value = self.value.to(states.device)
        tapped, _ = self.head.tap(
            states, self._anchor, layout="sbh",
            visual_mask=self._mask.chunk(self.ranks, dim=1)[self.rank],
            denominator=self._mask.sum(), value_out=self.value,
            carry=self.weight * self.scale, carry_always=True,
        )  # fmt: skip
        return (tapped, *output[1:]) if isinstance(output, tuple) else tapped


def main() -> None:
    torch.manual_seed(0)
    model = MegatronModel()
    pre = TapInLayer(model, model.layers[0], model.layers[1], WIDTH, IMAGE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(60):
        batch = make_batch(step)
        logits = model(input_ids=batch["tokens"], pixel_values=batch["pixel_values"])
        labels: Tensor = batch["labels"].T.flatten()
        F.cross_entropy(logits.flatten(0, 1), labels).backward()
        values.append(pre.value.item())
        optimizer.step()
        optimizer.zero_grad()
    print(f"pre_loss {values[0]:.3f} -> {values[-1]:.3f}")


if __name__ == "__main__":
    main()
