# SPDX-License-Identifier: Apache-2.0
"""The checkup of my training batches fails: "Expected input batch_size (2) to match (28)".

The labels were handed to the model, which then compared them with the one logit that was asked for.
A checkup needs no loss, so labels are left out.
"""

from __future__ import annotations

import torch

from prereg_kernels.checkup import visual_features
from tests.attached import seen
from tests.tiny import IMAGE_TOKEN, make_batch, tiny_llava


def test_labels_change_nothing() -> None:
    model, batch = tiny_llava().eval(), make_batch()
    assert "labels" in batch
    with seen(model) as states, torch.no_grad():
        model(**batch)
    found = visual_features(model, batch)
    assert len(found) == len(states)
    for layer, features in enumerate(found):
        assert torch.equal(features, states[layer][batch["input_ids"] == IMAGE_TOKEN]), layer
