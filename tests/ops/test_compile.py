# SPDX-License-Identifier: Apache-2.0
"""torch.compile without graph breaks, and torch's own checks of the custom ops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prereg_kernels import fused_pre_loss, pre_tap
from prereg_kernels.ops.arguments import check_inputs, is_mask
from prereg_kernels.ops.custom_ops import (
    masked_pre_gradients,
    masked_pre_losses,
    pre_gradients,
    pre_losses,
)
from prereg_kernels.ops.spec import Spec
from tests.helpers import Problem, make_problem, run, run_tap


class Recorder:
    """A backend of torch.compile that runs the graphs as they are and keeps their targets."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            self.graphs += 1
            self.targets += [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
            return graph.forward

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def options_of(selector: str) -> dict[str, Tensor]:
    mask = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])
    if selector == "visual_index":
        return {selector: mask.flatten().nonzero().squeeze(1)}
    return {selector: mask} if selector else {}


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("selector", ("visual_mask", "visual_index"))
def test_loss(recompute: bool, selector: str) -> None:
    problem = make_problem((3, 5), **options_of(selector))
    recorder = Recorder()
    compiled = torch.compile(fused_pre_loss, fullgraph=True, backend=recorder)
    ours = run(compiled, problem, 0.5, recompute=recompute)
    eager = run(fused_pre_loss, problem, 0.5, recompute=recompute)
    assert all(torch.equal(ours[name], eager[name]) for name in eager)
    assert recorder.graphs == 2
    ops = {name for name in recorder.targets if name.startswith("prereg.")}
    of_mask = "masked_" if selector == "visual_mask" else ""
    expected = {"pre_gradients", *["pre_losses"] * recompute}
    assert ops == {f"prereg.{of_mask}{name}.default" for name in expected}


@pytest.mark.parametrize("with_value", (False, True))
def test_tap(with_value: bool) -> None:
    problem = make_problem((3, 5), **options_of("visual_index"))
    recorder, out = Recorder(), torch.zeros(())

    def function(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        tapped, value = pre_tap(
            *problem.arguments(leaves),
            **problem.options,
            value_out=out if with_value else None,
        )
        return tapped.sin(), value

    compiled = torch.compile(function, fullgraph=True, backend=recorder)
    gradients = []
    for call in (function, compiled):
        leaves = problem.leaves()
        out.zero_()
        outputs, value = call(leaves)
        (outputs.sum() + 0.25 * value).backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    assert all(map(torch.equal, *gradients))
    assert gradients[0][1].abs().max() > 0
    assert "prereg.pre_gradients.default" in recorder.targets
    assert "prereg.pre_losses.default" not in recorder.targets
    if with_value:
        assert out.item() == run_tap(problem)["loss"].item() != 0


def test_inductor_and_autocast() -> None:
    """The default backend, once, under autocast and with master weights in float32."""
    problem = Problem(**{**vars(make_problem((4, 6))), "autocast": torch.bfloat16})
    ours = run(torch.compile(fused_pre_loss, fullgraph=True), problem)
    eager = run(fused_pre_loss, problem)
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("options", ({}, {"loss": "huber"}, {"chunk_rows": 4}, {"eps": 1e-6}))
def test_other_batch_sizes_do_not_break(options: dict[str, Any]) -> None:
    """Nor do numbers, which are symbolic with dynamic=True: eps, chunk_rows and huber's delta."""
    compiled = torch.compile(fused_pre_loss, fullgraph=True, dynamic=True, backend=Recorder())
    for tokens in (5, 9, 30):
        problem = make_problem((2, tokens), **options)
        assert torch.equal(run(compiled, problem)["dW0"], run(fused_pre_loss, problem)["dW0"])


def with_strides(problem: Problem) -> Problem:
    """Weights that are not contiguous, and hidden states neither."""
    return replace(
        problem,
        hidden=problem.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weights=[weight.T.contiguous().T for weight in problem.weights],
    )


OPS = {
    "paper": make_problem((3, 5)),
    "no head": make_problem((3, 5), (6,)),
    "one bias": Problem(**{**vars(make_problem((3, 5))), "biases": [None, torch.ones(9)]}),
    "no bias": make_problem((3, 5), bias=False),
    "mask": make_problem((3, 5), **options_of("visual_mask")),
    "index": make_problem((3, 5), **options_of("visual_index")),
    "nothing": make_problem((3, 5), visual_index=torch.zeros(0, dtype=torch.int64)),
    "strides": with_strides(make_problem((3, 5))),
    "strides, mask": with_strides(make_problem((3, 5), **options_of("visual_mask"))),
    "strides, index": with_strides(make_problem((3, 5), **options_of("visual_index"))),
    "strides, nothing": with_strides(
        make_problem((3, 5), visual_index=torch.zeros(0, dtype=torch.int64))
    ),
    "float16": make_problem((3, 5), dtype=torch.float16),
    "master weights": make_problem((3, 5), dtype=torch.bfloat16, weight_dtype=torch.float32),
}


def op_arguments(problem: Problem, needs_grad: bool) -> tuple[Any, ...]:
    leaves = {name: x.requires_grad_(needs_grad) for name, x in problem.leaves().items()}
    hidden, anchor, weights, biases = problem.arguments(leaves)
    selectors = (problem.options.get("visual_mask"), problem.options.get("visual_index"))
    inputs = check_inputs(hidden, anchor, weights, biases, *selectors, None, None)
    spec = Spec("gelu", "cosine", "none", 1e-8, hidden.dtype)
    return hidden, anchor, inputs.select, inputs.parameters, inputs.bias_layers, spec.pack()


CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
)


@pytest.mark.parametrize("name", OPS)
def test_opcheck_of_losses(name: str) -> None:
    arguments = op_arguments(OPS[name], True)
    op = masked_pre_losses if is_mask(arguments[2]) else pre_losses
    torch.library.opcheck(op, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("residual", (False, True))
def test_opcheck_of_gradients(name: str, residual: bool) -> None:
    arguments = op_arguments(OPS[name], True)
    hidden, _, select, parameters, bias_layers, _ = arguments
    depth = len(parameters) - len(bias_layers)
    slots = hidden.shape[:-1].numel() if select is None else select.shape[0]
    extra = (
        torch.full((slots,), 0.1),
        torch.ones_like(hidden) if residual else None,
        [True, True, *[True] * depth, *(layer % 2 == 0 for layer in range(len(bias_layers)))],
    )
    op = masked_pre_gradients if is_mask(select) else pre_gradients
    torch.library.opcheck(op, (*arguments, *extra), test_utils=CHECKS)
