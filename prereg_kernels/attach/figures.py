# SPDX-License-Identifier: Apache-2.0
"""The figures of a forward pass, over all ranks."""

from __future__ import annotations

import torch

from prereg_kernels._util import distributed
from prereg_kernels.attach.gradients import gradient_figures
from prereg_kernels.attach.passes import Record


def figures_of(last: Record, level: str, copies: int) -> dict[str, float]:
    """The figures that `PRe.metrics` returns. Under torch.distributed this is a collective.

    Args:
        level: of the PReConfig.
        copies: how many ranks got the same batch, as under tensor parallelism.
    """
    lm_sum = torch.where(last.labels > 0, last.lm_loss * last.labels, 0.0)
    # sums, so that ranks can be added up
    columns = [last.tokens, last.rows, lm_sum, last.labels, *last.sums()]
    totals, ranks = torch.stack([x.to(last.tokens) for x in columns]), 1
    gradients = last.gradient_sums()
    if gradients is not None:
        totals = torch.cat([totals, gradients.flatten()])
        ranks = torch.distributed.get_world_size() if distributed.is_running() else 1
    if distributed.is_running():
        torch.distributed.all_reduce(totals)
    tokens, rows, lm_total, labels, *others = (totals / copies).tolist()
    count = len(last.values)
    layers, sums = others[:count], others[count:]

    figures = {"visual_tokens": tokens}
    if level == "global":
        figures["images"] = rows
    if labels:
        figures["lm_loss"] = lm_total / labels
    if not last.is_complete() or last.is_idle:
        return figures
    per_layer = [total / max(rows, 1.0) for total in layers]
    if per_layer:
        figures["pre_loss"] = sum(per_layer) / len(per_layer)
    if len(per_layer) > 1:
        named = zip(last.values, per_layer, strict=True)
        figures |= {f"pre_loss/layer_{layer}": value for layer, value in named}
    by_layer = {layer: sums[3 * i : 3 * i + 3] for i, layer in enumerate(last.probes)}
    figures |= gradient_figures(by_layer, ranks / copies)
    return figures
