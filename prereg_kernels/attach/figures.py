"""The figures of a forward pass, over all ranks."""

from __future__ import annotations

import torch

from prereg_kernels._util import distributed
from prereg_kernels.attach.passes import Record


def figures_of(last: Record, level: str, copies: int) -> dict[str, float]:
    """As `PRe.metrics` says; a collective, where torch.distributed runs.

    Args:
        level: of the PReConfig.
        copies: how many ranks got the same batch, as under tensor parallelism.
    """
    lm_sum = torch.where(last.labels > 0, last.lm_loss * last.labels, 0.0)
    # sums, so that ranks can be added up
    columns = [last.tokens, last.rows, lm_sum, last.labels, *last.sums()]
    totals = torch.stack([x.to(last.tokens) for x in columns])
    if distributed.is_running():
        torch.distributed.all_reduce(totals)
    tokens, rows, lm_total, labels, *layers = (totals / copies).tolist()

    figures = {"visual_tokens": tokens}
    if level == "global":
        figures["images"] = rows
    if labels:
        figures["lm_loss"] = lm_total / labels
    if not last.is_complete():
        return figures
    per_layer = [total / max(rows, 1.0) for total in layers]
    if per_layer:
        figures["pre_loss"] = sum(per_layer) / len(per_layer)
    if len(per_layer) > 1:
        named = zip(last.values, per_layer, strict=True)
        figures |= {f"pre_loss/layer_{layer}": value for layer, value in named}
    return figures
