# SPDX-License-Identifier: Apache-2.0
"""I keep one mask on the device and fill it for each batch: the gradient is at the wrong tokens.

The tap reads the mask in backward, and did not notice that the next batch's was written into it
meanwhile. It raises as autograd does, and names the mask; with a mask of its own each batch is
right.
"""

import pytest
import torch

from prereg_kernels import pre_tap


def test_a_mask_that_the_next_batch_fills() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = torch.rand(2, 12, generator=generator) < 0.5
    anchor = torch.randn(12, 8, generator=generator)
    kept = torch.zeros(12, dtype=torch.bool)

    def forward(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return pre_tap(hidden, anchor, visual_mask=mask)[1]

    hidden = torch.randn(12, 8, generator=generator).requires_grad_()
    kept.copy_(batches[0])
    loss = forward(hidden, kept)
    kept.copy_(batches[1])
    with pytest.raises(RuntimeError, match="visual_mask: was modified in place"):
        loss.backward()
    assert hidden.grad is None

    loss = forward(hidden, batches[0].clone())
    kept.copy_(batches[0])
    loss.backward()
    assert torch.equal(hidden.grad.count_nonzero(dim=1) > 0, batches[0])
