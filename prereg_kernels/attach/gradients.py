# SPDX-License-Identifier: Apache-2.0
"""The gradients of L_LM and of L_PRe at the hidden states of a layer: their norms, their cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def gradient_figures(sums: Mapping[int, Sequence[float]], ranks: float = 1.0) -> dict[str, float]:
    """The figures that `PRe.metrics` names. A layer without a gradient has none.

    Args:
        sums: {layer: those of `TapProbe`, over all micro-batches and ranks}.
        ranks: how many ranks the parameters' gradients are averaged over.
    """
    figures = {}
    for layer, (lm, pre, product) in sums.items():
        if lm == pre == 0:
            continue
        place = f"/layer_{layer}" if len(sums) > 1 else ""
        figures[f"lm_hidden_grad_norm{place}"] = math.sqrt(lm) / ranks
        figures[f"pre_hidden_grad_norm{place}"] = math.sqrt(pre) / ranks
        if lm and pre:
            figures[f"hidden_grad_cosine{place}"] = product / math.sqrt(lm) / math.sqrt(pre)
    return figures
