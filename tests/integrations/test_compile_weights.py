# SPDX-License-Identifier: Apache-2.0
"""A weight that changes in every step beside torch.compile: it is traced as a number of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from prereg_kernels import apply_pre
from tests.attach.misplaced import right_batch
from tests.attached import compare
from tests.tiny import gradients, tiny_llava

STEPS = 8


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_a_schedule_costs_one_recompilation() -> None:
    """The second weight is seen to differ from the first; the others run the graph that this made,
    with gradients of their own weight."""
    model = tiny_llava()
    model.config.text_config.num_hidden_layers = 1
    del model.get_decoder().layers[1:]
    pre = apply_pre(model, layers=1, weight_schedule="cosine", weight_warmup_steps=2)
    batch = right_batch()
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for step in range(1, STEPS):  # in the first, of weight 0, nothing is computed
        pre.weight = pre.config.weight_at(step, STEPS)
        model.zero_grad()
        compiled(**batch).loss.backward()
        found = gradients(model)
        graphs.append(counters["stats"]["unique_graphs"])
        model.zero_grad()
        model(**batch).loss.backward()
        compare(found, gradients(model))
    assert len({pre.config.weight_at(step, STEPS) for step in range(1, STEPS)}) > STEPS - 3
    assert graphs == [graphs[0]] + [graphs[0] + 1] * (STEPS - 2), graphs
