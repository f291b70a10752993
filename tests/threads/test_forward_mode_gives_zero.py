# SPDX-License-Identifier: Apache-2.0
"""torch.func.jvp of the loss is exactly zero, and jacfwd is a matrix of zeros.

The fused loss runs below autograd, where forward mode saw a constant. It has one derivative, in
reverse mode: forward mode raises, and the error names eager_pre_loss, whose number is right.
"""

import pytest
import torch
from torch.func import jvp

from prereg_kernels import eager_pre_loss, fused_pre_loss


def test_forward_mode() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, anchor, tangent = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)

    with pytest.raises(RuntimeError, match="eager_pre_loss"):
        jvp(lambda x: fused_pre_loss(x, anchor), (hidden,), (tangent,))

    _, derivative = jvp(lambda x: eager_pre_loss(x, anchor), (hidden,), (tangent,))
    step = 1e-6
    ends = [eager_pre_loss(hidden + sign * step * tangent, anchor) for sign in (1, -1)]
    assert derivative.abs() > 0.01
    torch.testing.assert_close(derivative, (ends[0] - ends[1]) / (2 * step))
