# SPDX-License-Identifier: Apache-2.0
"""My compiled step makes all weights infinite when the count that I divide by is zero.

The count comes as a tensor, all-reduced over the ranks, and a mistake in it (or a rank that counts
its text alone) makes it 0 where there are images. The loss was divided by it. In a graph, as on a
GPU, nobody may wait for the value: the term and its gradients are 0. Where the value is at hand,
it is an error that says what came.
"""

import pytest
import torch

from prereg_kernels import PReHead


@pytest.mark.parametrize("tap", (False, True))
def test_a_count_of_zero(tap: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, anchor = torch.randn(2, 6, 8, generator=generator)
    head, index = PReHead(8, 8), torch.tensor([1, 4])

    def step(hidden: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        result = head(hidden, anchor, tap=tap, visual_index=index, denominator=count)
        return result[1] if tap else result

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hidden.requires_grad_()
    for count, is_zero in ((torch.tensor(2), False), (torch.tensor(0), True)):
        head.zero_grad()
        hidden.grad = None
        compiled(hidden, count).backward()
        for x in (hidden, *head.parameters()):
            assert x.grad.isfinite().all()
            assert (x.grad.count_nonzero() == 0) == is_zero

    with pytest.raises(ValueError, match="denominator: got 0 for a batch of 2 visual tokens"):
        step(hidden, torch.tensor(0))
