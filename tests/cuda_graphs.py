# SPDX-License-Identifier: Apache-2.0
"""What torch.compile(mode="reduce-overhead") would capture into CUDA graphs, where there is no GPU:
Inductor's own checks, of the graphs that it would get. Nothing is compiled."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import partitioners
from torch._inductor import compile_fx, config, cudagraph_utils, utils


class Verdict(NamedTuple):
    """Of a graph."""

    is_backward: bool
    ops: set[str]  # of prereg, in it
    unsafe: str | None  # the op for which it is not captured, or is cut
    mutation: str | None  # or the input that it writes


class Inspector:
    """A backend of torch.compile that asks about each graph, and runs it as it is."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        forward, backward = (lambda g, x, back=back: self._ask(g, x, back) for back in (0, 1))
        partition = partitioners.min_cut_rematerialization_partition
        compiler = aot_autograd(
            fw_compiler=forward, bw_compiler=backward, partition_fn=partition,
            keep_inference_input_mutations=True,
        )  # fmt: skip
        return compiler(graph, inputs)

    def _ask(self, graph: fx.GraphModule, inputs: list[Any], is_backward: bool) -> Any:
        if is_backward:  # what was saved stays where it is, Inductor says
            static = list(range(utils.count_tangents(graph)))
        else:
            static = list(compile_fx.get_static_input_idxs(0))
        names = {str(n.target) for n in graph.graph.nodes if str(n.target).startswith("prereg.")}
        unsafe = utils.get_first_incompatible_cudagraph_node(graph)
        self.verdicts.append(
            Verdict(
                bool(is_backward),
                {name.split(".")[1] for name in names},
                None if unsafe is None else str(unsafe.target),
                cudagraph_utils.check_for_mutation(
                    _wrapped(graph, static), inputs, lambda x: False
                ),
            )
        )
        return graph.forward


def _wrapped(graph: fx.GraphModule, static: list[int]) -> Any:
    """The graph as Inductor hands it to the check that it makes before each run."""
    places = {n: i for i, n in enumerate(graph.graph.find_nodes(op="placeholder"))}
    copies = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    names = [field.name for field in fields(cudagraph_utils.WrappedFunction)]
    settings = {n: getattr(config.triton, n) for n in names if n.startswith("cudagraph_")}
    return cudagraph_utils.WrappedFunction(
        model=graph.forward,
        static_input_idxs=static,
        id=cudagraph_utils.FunctionID(0),
        constants=(),
        placeholders=cudagraph_utils.get_placeholder_info(graph.graph),
        mutated_input_idxs=[places[n.args[0]] for n in copies if n.args[0] in places],
        **settings,  # since torch 2.15
    )
