# SPDX-License-Identifier: Apache-2.0
"""The loss inside of a checkpointed block: "Unpack is being triggered for a tensor that was [...]".

The backward pass read its saved tensors twice, and a checkpoint gives them out once. Each schedule
of the loss now reads them once, and a checkpointed block has the gradients of a plain one.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from prereg_kernels import eager_pre_loss, fused_pre_loss
from tests.helpers import make_problem, relative_error


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpointed_block(recompute: bool, reduction: str, use_reentrant: bool) -> None:
    problem = make_problem((6,), dtype=torch.float64, reduction=reduction)

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        leaves = problem.leaves()

        def block(x: torch.Tensor) -> torch.Tensor:
            arguments = problem.arguments(leaves | {"hidden": x.tanh()})
            if not checkpointed:
                return eager_pre_loss(*arguments, **problem.options).square().sum()
            return fused_pre_loss(*arguments, **problem.options, recompute=recompute).square().sum()

        x = leaves["hidden"]
        loss = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
        loss.backward()
        return [leaf.grad for leaf in leaves.values()]

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        assert relative_error(ours, expected) < 1e-9
