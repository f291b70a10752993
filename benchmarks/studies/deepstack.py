# SPDX-License-Identifier: Apache-2.0
"""Whether PRe gives anything where the encoder feeds layers of the decoder, too, as Qwen3-VL's.

    python -m benchmarks.studies.deepstack --workers 2    # 18 runs on two cores

The model of the study of merging, and DeepStack (arXiv 2406.04334) in Qwen3-VL's form: each of two
middle layers of the encoder has a merger of its own, whose rows are added to the visual tokens
behind one of the decoder's first two layers. These mergers are part of the projector: they train,
and freeze, with it. PRe is behind them, at layer 4, and its anchor is of the encoder's last layer.
Every run is written into the results as it ends; what is there is not run again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.report import RESULTS
from benchmarks.studies.demo_run import BASELINE, run_missing
from benchmarks.studies.merging import (
    MERGE,
    VARIANTS,
    format_table,
    merging_model,
    run_config,
    train_and_ask,
)

OUT = RESULTS / "deepstack.json"
SEEDS = range(800, 806)  # no other study has them
TAKEN = (2, 3)
"""Layers of the encoder, of 4, counted from 1; the n-th feeds what leaves the decoder's n-th."""


class DeepMerger(nn.Module):
    """(images, k tokens, D) to (images, tokens, W), k = `MERGE`².

    It normalizes after joining, as Qwen3-VL's mergers of middle layers do (transformers 5.17,
    `Qwen3VLVisionPatchMerger` with `use_postshuffle_norm`).
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        joined = MERGE**2 * width
        self.norm = nn.LayerNorm(joined)
        self.mlp = nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, out))

    def forward(self, x: Tensor) -> Tensor:
        """Of patches block by block."""
        out: Tensor = self.mlp(self.norm(x.unflatten(1, (-1, MERGE**2)).flatten(2)))
        return out


class Feed(nn.Module):
    """One layer of the encoder into one of the decoder, by hooks that a deep copy takes along."""

    def __init__(self, blocks: nn.Module, width: int, out: int, image_token: int) -> None:
        super().__init__()
        self.blocks, self.merger = blocks, DeepMerger(width, out)
        self.image_token = image_token
        self.seen: Tensor | None = None
        self.visual: Tensor | None = None

    def see_ids(self, module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        """Before the model: where its visual tokens are."""
        self.visual = named["input_ids"] == self.image_token

    def see_patches(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """After the encoder's layer: its patches, without the class token."""
        self.seen = (output[0] if isinstance(output, tuple) else output)[:, 1:]

    def add(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        """After the decoder's layer; a call without images adds nothing."""
        if self.seen is None or self.visual is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        rows = self.merger(self.blocks(self.seen)).flatten(0, 1)
        fed = hidden + torch.zeros_like(hidden).masked_scatter(self.visual[..., None], rows)
        self.seen = self.visual = None
        return (fed, *output[1:]) if isinstance(output, tuple) else fed


class Deepstack(nn.ModuleList):
    """The last part of the projector: it holds the mergers, and passes the rows on."""

    def forward(self, rows: Tensor) -> Tensor:
        """As they came."""
        return rows


def deepstack_model(run: Any, cache: str) -> Any:
    """The model that a run begins with: its tower trained, the mergers and the decoder not."""
    model = merging_model(run, cache)
    projector = model.model.multi_modal_projector
    width, image_token = run.model.width, model.config.image_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed + 10**6)  # not the first merger's weights
        feeds = [Feed(projector[0], width, width, image_token) for _ in TAKEN]
    projector.append(Deepstack(feeds))
    tower = model.model.vision_tower
    encoder = getattr(tower, "vision_model", tower).encoder  # before transformers 5.6
    for number, (layer, feed) in enumerate(zip(TAKEN, feeds, strict=True)):
        model.model.register_forward_pre_hook(feed.see_ids, with_kwargs=True)
        encoder.layers[layer - 1].register_forward_hook(feed.see_patches)
        model.model.language_model.layers[number].register_forward_hook(feed.add)
    return model


def main() -> None:
    """Run what is missing, or print what is there."""

    def todo(seeds: range) -> list[tuple[str, int]]:
        return [(variant, seed) for seed in seeds for variant in VARIANTS]

    def towers() -> list[Any]:
        return [run_config(BASELINE, SEEDS[0])]

    measure = partial(train_and_ask, new=deepstack_model)
    run_missing(__doc__, SEEDS, OUT, todo, towers, measure, format_table)


if __name__ == "__main__":
    main()
