# SPDX-License-Identifier: Apache-2.0
"""choose_tokens: the random subset of the visual tokens that a forward pass regularises.

K of the N visual tokens of a micro-batch are drawn without replacement. Each subset is as likely as
any other, so the mean over the K is an unbiased estimate of the mean over the N.

If the loss is divided by a denominator, the visual tokens of the whole step, the sum over the K is
weighted by N / K (Horvitz and Thompson 1952: each token was drawn with probability K / N). That
makes it an unbiased estimate of the sum over the N. The step's term is a sum of these, so it is an
unbiased estimate of the step's mean. Dividing by the step's number of drawn tokens would be biased:
it would weight the micro-batches by K, which is rounded, in place of N.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def choose_tokens(
    tokens: int, fraction: float, address: tuple[int, ...], device: torch.device
) -> Tensor:
    """Draw a fraction of the visual tokens, as a pure function of the arguments, without a sync.

    Args:
        tokens: N.
        fraction: in (0, 1].
        address: non-negative numbers that say which draw this is: seed, rank, pass.

    Returns:
        (K,) int64, ascending, in [0, N); K is `fraction * N` to the nearest integer, and at least 1
        unless N is 0.
    """
    count = min(tokens, max(1, round(fraction * tokens)))
    seed = np.random.SeedSequence(address).generate_state(1, np.uint64)
    generator = torch.Generator(device).manual_seed(int(seed[0]) >> 1)
    order = torch.randperm(tokens, generator=generator, device=device)
    return order[:count].sort().values
