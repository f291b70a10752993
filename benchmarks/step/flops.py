# SPDX-License-Identifier: Apache-2.0
"""The floating-point operations of a training step, from the config, written out.

A matmul of (n, i) by (i, o) is 2 n i o. A layer that trains does three of them for each weight (the
product, and the two gradients), a frozen layer one, a checkpointed one four, but for its last
matrix: recomputation stops where nothing that was saved is missing any more. Attention is two
matmuls forward and four backward; what a flash kernel computes again in backward is not counted.
Norms, activations, the embedding and the optimizer are left out: they move bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.step.models import Recipe


@dataclass(frozen=True)
class StepFlops:
    """By part; all of one step."""

    decoder: int  # the matmuls of the layers
    attention: int  # of the layers, causal: half of the square
    lm_head: int
    projector: int
    tower: int  # forward alone
    head: int  # PRe's: six matmuls, which is all that `apply_pre` adds

    @property
    def without_head(self) -> int:
        return self.decoder + self.attention + self.lm_head + self.projector + self.tower

    @property
    def head_percent(self) -> float:
        """PRe's matmuls, of a step without it."""
        return 100 * self.head / self.without_head

    def describe(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self) | {
            "without_head": self.without_head,
            "head_percent": self.head_percent,
        }


def count_flops(recipe: Recipe, config: Any, samples: int, checkpointing: bool) -> StepFlops:
    """Of `samples` sequences, with the paper's head of D -> D -> D."""
    text = config.text_config
    length = recipe.positions(config)
    tokens, visual = samples * length, samples * recipe.visual_tokens(config)
    width, count, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    queries, keys = heads * head_dim, text.num_key_value_heads * head_dim
    last = width * text.intermediate_size
    weights = width * (2 * queries + 2 * keys) + 3 * last
    again, passes = (weights - last, 4) if checkpointing else (0, 3)
    return StepFlops(
        decoder=2 * tokens * count * (3 * weights + again),
        attention=2 * passes * samples * length**2 * queries * count,  # 2 matmuls, half of each
        lm_head=6 * tokens * width * text.vocab_size,
        projector=_projector(config, visual),
        tower=_tower(recipe, config, samples),
        head=6 * visual * 2 * width**2,
    )


def _projector(config: Any, visual: int) -> int:
    """Three products a weight, but none for the gradient of the frozen tower's features."""
    text, vision = config.text_config, config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        inner = vision.hidden_size * vision.spatial_merge_size**2
        # a norm that trains stands before the first matrix, so that its input has a gradient
        return 6 * visual * inner * (inner + vision.out_hidden_size)
    first, second = vision.hidden_size * text.hidden_size, text.hidden_size**2
    return 4 * visual * first + 6 * visual * second


def _tower(recipe: Recipe, config: Any, samples: int) -> int:
    vision = config.vision_config
    patches = recipe.grid[0] * recipe.grid[1]
    if hasattr(vision, "spatial_merge_size"):
        width, layers = vision.hidden_size, vision.depth
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        weights = 4 * width**2 + 3 * width * vision.intermediate_size
        window = (vision.window_size // vision.patch_size) ** 2
        whole = len(vision.fullatt_block_indexes)
        seen = whole * patches + (layers - whole) * min(window, patches)
        return samples * patches * (2 * layers * weights + 4 * width * seen + 2 * pixels * width)
    width, layers = vision.hidden_size, vision.num_hidden_layers
    tokens = patches + 1  # CLIP's class token
    weights = 4 * width**2 + 2 * width * vision.intermediate_size
    embedding = 2 * patches * 3 * vision.patch_size**2 * width
    return samples * (layers * tokens * (2 * weights + 4 * tokens * width) + embedding)
