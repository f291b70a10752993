# SPDX-License-Identifier: Apache-2.0
"""What a step does, by what it does on the meta device: no weights, no arithmetic.

Matrix products and passes over memory are seen where torch dispatches them, forward and backward,
attention where the model calls `scaled_dot_product_attention`, experts where it calls
`grouped_mm`, and what autograd keeps where it keeps it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from prereg_kernels._util import private
from prereg_kernels.estimate.real_integers import RealIntegers
from prereg_kernels.estimate.structure import Counts

aten = torch.ops.aten


def _inner(place: int) -> Callable[[Any, Tensor], float]:
    return lambda args, out: 2.0 * out.numel() * args[place].shape[-1]


def _convolved(args: Any, out: Tensor) -> float:
    return 2.0 * out.numel() * args[1][0].numel()


def _convolved_back(args: Any, out: Any) -> float:
    gradient, _, weight, *_, mask = args
    return 2.0 * gradient.numel() * weight[0].numel() * sum(mask[:2])


PRODUCTS: dict[Any, Callable[[Any, Any], float]] = {
    aten.mm.default: _inner(0),
    aten.bmm.default: _inner(0),
    aten.addmm.default: _inner(1),
    aten.baddbmm.default: _inner(1),
    aten.convolution.default: _convolved,
    aten.convolution_backward.default: _convolved_back,
}
"""{an operator: floating-point operations by its arguments and result}."""


@contextmanager
def tracing(model: nn.Module) -> Iterator[dict[str, Counts]]:
    """{block: its counts} of the forward and backward passes inside, in the order of the calls.

    Args:
        model: on the meta device. Its parameters need gradients as in the step that is counted.
    """
    recorder = _Recorder(model.parameters())
    with ExitStack() as stack:
        for path, module in model.named_modules():
            block = block_of(path)

            def enter(*_: Any, block: str = block) -> None:
                recorder.enter(block)

            def leave(*_: Any) -> None:
                recorder.leave()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(saved_tensors_hooks(recorder.pack, lambda kept: kept))
        stack.enter_context(_Functions(recorder))
        stack.enter_context(recorder)
        yield recorder.blocks


def block_of(path: str) -> str:
    """The entry of an outermost list that a module or parameter is in; else the path itself.

    Example:
        >>> block_of("model.layers.3.mlp.experts.0.up"), block_of("model.norm")
        ('model.layers.3', 'model.norm')
    """
    steps = path.split(".")
    number = next((i for i, step in enumerate(steps) if step.isdecimal()), None)
    return path if number is None else ".".join(steps[: number + 1])


class _Recorder(RealIntegers):
    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__()
        self.blocks: dict[str, Counts] = {}
        self.path = [""]
        self.begins: list[tuple[int, str]] = [(-1, "")]  # sequence numbers, of autograd's nodes
        self.parameters = {private.storage_of(p) for p in parameters}
        self.kept: dict[int, Any] = {}  # storages, alive so that no other takes their place
        self.hidden = False

    def enter(self, block: str) -> None:
        self.path.append(block)
        self.begins.append((private.next_autograd_node(), block))

    def leave(self) -> None:
        self.path.pop()
        self.begins.append((private.next_autograd_node(), self.path[-1]))

    def counts(self) -> tuple[Counts, bool]:
        """Of the block that runs, and whether it runs backward."""
        node = private.current_autograd_node()
        block = self.path[-1]
        if node is not None:
            place = bisect_right(self.begins, private.node_number(node), key=lambda begin: begin[0])
            block = self.begins[place - 1][1]
        return self.blocks.setdefault(block, Counts()), node is not None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.run(func, args, kwargs or {})
        if self.hidden:
            return result
        if func in PRODUCTS:
            self.product(PRODUCTS[func](args, result))
            return result
        inputs = [x for x in private.leaves_of((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in private.leaves_of(result) if isinstance(x, Tensor)]
        if not func.is_view and any(x.is_floating_point() for x in outputs):
            counts, is_backward = self.counts()
            read = () if func is aten.embedding.default else inputs  # of a table, a few rows alone
            moved = sum(x.nbytes for x in (*read, *outputs))
            if is_backward:
                counts.moved_again += moved
            else:
                counts.moved += moved
                counts.calls += 1
                counts.widest = max(counts.widest, *(float(x.nbytes) for x in outputs))
        return result

    def product(self, flops: float) -> None:
        counts, is_backward = self.counts()
        if is_backward:
            counts.backward += flops
        else:
            counts.forward += flops
            counts.calls += 1

    def alone(self, function: Any, *args: Tensor | None) -> Tensor:
        """An operator of one's own: nothing in it is counted but its products."""
        result: Tensor = function.apply(self, *args)
        counts, _ = self.counts()
        counts.widest = max(counts.widest, float(result.nbytes))
        return result

    @contextmanager
    def hiding(self) -> Iterator[None]:
        self.hidden = True
        try:
            yield
        finally:
            self.hidden = False

    def pack(self, tensor: Tensor) -> Tensor:
        (counts, _), storage = self.counts(), private.storage_of(tensor)
        counts.again = counts.forward
        if storage not in self.parameters and storage not in self.kept:
            self.kept[storage] = tensor.untyped_storage()
            counts.saved += tensor.untyped_storage().nbytes()
        return tensor


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            given = (*args, *(kwargs.get(name) for name in names[len(args) :]))
            return self.recorder.alone(_Attention, *given[:4])
        if func in private.GROUPED_PRODUCTS:
            return self.recorder.alone(_Grouped, *args[:2])
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            made = func(*args, **{**kwargs, "device": None})
            return func(*args, **kwargs) if made.is_floating_point() else made
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """It keeps what a flash kernel keeps: its arguments, its result, and a number a row.

    A mask that is computed of the model's states, as a relative position bias is, gets a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, recorder: _Recorder, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> Tensor:
        with recorder.hiding():
            *outer, heads, length, _ = query.shape  # flash kernels write heads side by side
            out = query.new_empty(*outer, length, heads, value.shape[-1]).transpose(-2, -3)
            rows = out.new_empty(out.shape[:-1]).float()
        bias = mask if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(query, key, value, bias, out, rows)
        pairs = 2.0 * query[..., 0].numel() * key.shape[-2]
        ctx.recorder, ctx.flops = recorder, pairs * (query.shape[-1] + value.shape[-1])
        recorder.product(ctx.flops)  # of all pairs of positions, causal or not
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.recorder.product(2 * ctx.flops)
        with ctx.recorder.hiding():
            *given, bias = ctx.saved_tensors[:4]
            of_bias = None if bias is None else torch.empty_like(bias)
            return None, *map(torch.empty_like, given), of_bias


class _Grouped(torch.autograd.Function):
    """Rows, each times the matrix of its expert."""

    @staticmethod
    def forward(ctx: Any, recorder: _Recorder, rows: Tensor, matrices: Tensor) -> Tensor:
        with recorder.hiding():
            out = matrices.new_empty(rows.shape[0], matrices.shape[-1])
        ctx.save_for_backward(rows, matrices)
        ctx.recorder, ctx.flops = recorder, 2.0 * rows.numel() * matrices.shape[-1]
        recorder.product(ctx.flops)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        ctx.recorder.product(sum(needed) * ctx.flops)
        with ctx.recorder.hiding():
            gradients = zip(ctx.saved_tensors, needed, strict=True)
            return None, *(torch.empty_like(x) if is_needed else None for x, is_needed in gradients)
