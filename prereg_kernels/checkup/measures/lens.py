# SPDX-License-Identifier: Apache-2.0
"""The logit lens: which word would the model say at a visual token, were this the last layer?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prereg_kernels.checkup.measures.tensors import check_features, pieces

VOCABULARY = 8192
"""Tokens whose logits are computed at a time."""


class TopToken(NamedTuple):
    """A token of the vocabulary, and how many visual tokens it is the top one of."""

    token: int
    times: int


class Lens(NamedTuple):
    """Top tokens of the visual tokens."""

    silenced: float  # share of visual tokens whose top token is one of the few most frequent
    entropy: float  # of the distribution of top tokens, in bits: 0 where all have the same
    most_frequent: tuple[TopToken, ...]  # the most frequent first, ties by id

    @classmethod
    def of(cls, times: Mapping[int, int], *, few: int = 5, listed: int = 20) -> Lens:
        """From {token: of how many visual tokens it is the top one}.

        Args:
            few: how many of the most frequent top tokens count as those of silenced tokens.
            listed: how many of them to return.

        Raises:
            ValueError: where no visual token was counted, or fewer than none.
        """
        if min(times.values(), default=0) < 0:
            raise ValueError(f"times: expected counts, got {min(times.values())}")
        rows = sum(times.values())
        if not rows:
            raise ValueError("features: expected at least 1 row in all, got 0")
        ordered = sorted(times.items(), key=lambda item: (-item[1], item[0]))
        return cls(
            sum(count for _, count in ordered[:few]) / rows,
            math.fsum(n / rows * math.log2(rows / n) for n in times.values() if n),
            tuple(TopToken(*item) for item in ordered[:listed]),
        )


class LensSums:
    """`logit_lens` of features that arrive in batches.

    Args:
        norm: the model's final norm; takes rows (n, D) of the features.
        weight: (V, D), of the `lm_head`.
        bias: (V,), of the `lm_head`, where it has one.

    A monotonic cap on the logits (Gemma's) changes no top token and is left out.
    Memory: V counts, and one piece of the weights and of the logits at a time.

    Raises:
        ValueError: a weight or bias of another shape.
    """

    def __init__(
        self, norm: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None = None
    ) -> None:
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"weight, bias: expected shapes (V, D) and (V,), got {tuple(weight.shape)} and "
                f"{None if bias is None else tuple(bias.shape)}"
            )
        self._norm, self._weight, self._bias = norm, weight, bias
        self._counts = torch.zeros(len(weight), dtype=torch.int64)

    @torch.no_grad()
    def update(self, features: Tensor) -> LensSums:
        """Add a batch, (N, D), in the dtype and on the device that `norm` expects."""
        check_features(features, columns=self._weight.shape[1])
        with torch.autocast(features.device.type, enabled=False):
            for part in pieces(len(features), max(features.shape[1], VOCABULARY)):
                top = self._top(self._norm(features[part]))
                self._counts += torch.bincount(top.cpu(), minlength=len(self._counts))
        return self

    def _top(self, x: Tensor) -> Tensor:
        """(n,) ids of the largest logits, in float32 at least: in bfloat16 many would tie."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.to(dtype)
        best = x.new_full((len(x),), -math.inf)
        top = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for start in range(0, len(self._weight), VOCABULARY):
            part = slice(start, start + VOCABULARY)
            logits = x @ self._weight[part].to(x).T
            if self._bias is not None:
                logits += self._bias[part].to(x)
            value, index = logits.max(dim=1)
            top = torch.where(value > best, index + start, top)
            best = torch.maximum(value, best)  # NaN if one is
        if not bool(torch.isfinite(best).all()):
            raise ValueError("norm, weight, bias: expected finite logits, got NaN or infinity")
        return top

    @property
    def times(self) -> dict[int, int]:
        """{token: of how many visual tokens it is the top one}, of those that occur."""
        tokens = self._counts.nonzero().flatten()
        return dict(zip(tokens.tolist(), self._counts[tokens].tolist(), strict=True))

    def result(self, *, few: int = 5, listed: int = 20) -> Lens:
        """Of all rows so far, as `Lens.of`."""
        return Lens.of(self.times, few=few, listed=listed)


def logit_lens(
    features: Tensor,
    norm: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    few: int = 5,
    listed: int = 20,
) -> Lens:
    """The top token of the vocabulary at each visual token, through the final norm and `lm_head`.

    Where most visual tokens share a handful of top tokens, whatever the image, the paper calls them
    silenced (arXiv 2603.20808).

    Args:
        features: (N, D), N at least 1, in the dtype and on the device that `norm` expects; of a
            layer, before the final norm.
        norm, weight, bias: as in `LensSums`.
        few, listed: as in `Lens.of`.

    Raises:
        ValueError: another shape, no rows, or features or logits that are not finite.

    Example:
        >>> from prereg_kernels.checkup import logit_lens
        >>> features = torch.tensor([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
        >>> lens = logit_lens(features, torch.nn.Identity(), torch.eye(2), few=1)
        >>> lens.silenced, lens.most_frequent[0]  # of 4 tokens 3 say token 1
        (0.75, TopToken(token=1, times=3))
    """
    return LensSums(norm, weight, bias).update(features).result(few=few, listed=listed)
