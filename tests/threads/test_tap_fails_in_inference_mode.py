# SPDX-License-Identifier: Apache-2.0
"""Evaluation under torch.inference_mode() ends in "Inference tensors do not track version counter".

The tap noted how often the anchor had been written, which such a tensor does not count. There is no
backward to notice it for: under inference mode the tap passes on what it got, with the loss.
"""

import torch
import torch.nn.functional as F

from prereg_kernels import pre_tap


def test_evaluation_under_inference_mode() -> None:
    with torch.inference_mode():
        hidden, anchor = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
        tapped, loss = pre_tap(hidden, anchor, compute_value=True)
        assert torch.equal(tapped, hidden)
        torch.testing.assert_close(loss, -F.cosine_similarity(hidden, anchor).mean())
