# SPDX-License-Identifier: Apache-2.0
"""The losses between a prediction and a target, and their gradient, an element at a time.

With p and q the normalised prediction and target, and C columns:

    p = (z - shift) * scale      none: z      l2: z / max(|z|, eps)      layer: (z - mean) / std
    cosine: loss = -sum p q                 dp = p - q
    mse: loss = mean (p - q)^2              dp = 2 (p - q) / C
    smooth_l1: loss = mean huber(p - q)     dp = clamp(p - q, -1, 1) / C
    l1: loss = mean |p - q|                 dp = sign(p - q) / C

    dz = scale * (dp - mean - p along)      none: mean = along = 0, scale = 1
                                            l2: mean = 0, along = sum p dp
                                            layer: mean = mean dp, along = mean p dp

The cosine is normalised as l2. Its gradient with respect to p is -q; but p is taken out again by
the projection, so that p - q serves as well, and nothing cancels near p = q, where training spends
its time. Where |z| < eps the norm is a constant: nothing is projected, and of p - q only -q may be
left (along = 1). Where the cosine is 0, along is 1 as well: exactly, so that a zero target has a
zero gradient.
"""

import triton
import triton.language as tl

from prereg_kernels.ops.backends.triton.launch import INTERPRETED


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_two(a, b):
    """The sums of both, in one exchange between the warps: three barriers instead of six."""
    # Interpreted, a reduction of one's own takes seconds
    return (tl.sum(a), tl.sum(b)) if INTERPRETED else tl.reduce((a, b), 0, _add_two)


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def sum_three(a, b, c):
    return (tl.sum(a), tl.sum(b), tl.sum(c)) if INTERPRETED else tl.reduce((a, b, c), 0, _add_three)


@triton.jit
def scale_of_norm(norm, EPS: tl.constexpr):
    """1 / max(norm, eps). A NaN stays one."""
    return 1 / tl.where(norm < EPS, EPS, norm)


@triton.jit
def scale_of_deviation(squares, COLUMNS: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(variance + eps)."""
    return 1 / tl.sqrt(squares / COLUMNS + EPS)


@triton.jit
def loss_terms(p, q, LOSS: tl.constexpr):
    """What `loss_of_sum` wants the sum of."""
    d = p - q
    if LOSS == "cosine":
        terms = -p * q
    elif LOSS == "mse":
        terms = d * d
    elif LOSS == "l1":
        terms = tl.abs(d)
    else:
        size = tl.abs(d)
        terms = tl.where(size < 1, 0.5 * d * d, size - 0.5)
    return terms


@triton.jit
def loss_of_sum(total, COLUMNS: tl.constexpr, LOSS: tl.constexpr):
    if LOSS != "cosine":
        total = total / COLUMNS
    return total


@triton.jit
def loss_slope(p, q, COLUMNS: tl.constexpr, LOSS: tl.constexpr):
    """dp."""
    d = p - q
    if LOSS == "mse":
        d = d * (2 / COLUMNS)
    elif LOSS == "smooth_l1":
        d = tl.where(d > 1, 1.0, tl.where(d < -1, -1.0, d)) * (1 / COLUMNS)
    elif LOSS == "l1":
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(d.dtype)
        d = sign * (1 / COLUMNS)
    return d


@triton.jit
def projection(
    total,
    dp_sum,
    p_dp_sum,
    short,
    COLUMNS: tl.constexpr,
    LOSS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """(mean, along) of the sums of `loss_terms`, of dp and of p dp over a row."""
    mean, along = dp_sum / COLUMNS, p_dp_sum / COLUMNS
    if LOSS == "cosine":
        along = tl.where(short | (total == 0), 1.0, p_dp_sum)
    elif NORMALIZE == "l2":
        along = tl.where(short, 0.0, p_dp_sum)
    return mean, along


@triton.jit
def project(p, dp, mean, along, scale, NORMALIZE: tl.constexpr):
    """dz."""
    if NORMALIZE == "none":
        dz = dp
    elif NORMALIZE == "l2":
        dz = (dp - p * along) * scale
    else:
        dz = (dp - mean - p * along) * scale
    return dz
