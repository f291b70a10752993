# SPDX-License-Identifier: Apache-2.0
"""torch.func, forward mode, double backward: the numbers of eager autograd, or a clear error."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from prereg_kernels import PReHead, eager_pre_loss, fused_pre_loss, pre_tap
from prereg_kernels.attach.pooling import pool_images
from prereg_kernels.ops import custom_ops
from prereg_kernels.ops.transforms import is_plain
from tests.fuzzing import fuzz
from tests.helpers import ACTIVATION_NAMES, LOSS_NAMES, Problem, make_problem, relative_error

Function = Callable[[Tensor], Tensor]
Transform = Callable[[Function, Tensor, Tensor], Tensor]


def dual(f: Function, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
    return torch.zeros(()) if tangent is None else tangent


def dual_upstream(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """A forward-mode derivative of backward, by its upstream gradient alone."""
    x = x.clone().requires_grad_()
    loss = f(x)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 2.0))
        (gradient,) = torch.autograd.grad(loss, x, upstream, allow_unused=True)
        tangent = None if gradient is None else forward_ad.unpack_dual(gradient).tangent
    return torch.zeros_like(x) if tangent is None else tangent


def within_another(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """An inner transform of something else must not hide the outer one's tangent."""
    return jvp(lambda x: jvp(lambda y: f(x) * y, (v.sum(),), (v.sum(),))[1], (x,), (v,))[1]


def inside_no_grad(f: Function, x: Tensor, v: Tensor) -> Tensor:
    def both(x: Tensor) -> Tensor:
        with torch.no_grad():
            constant = f(x)
        return constant * x.sum()

    return grad(both)(x)


def batch(x: Tensor) -> Tensor:
    return torch.stack((x, 0.5 * x, x + 1))


REVERSE: dict[str, Transform] = {
    "grad": lambda f, x, v: grad(f)(x),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "vjp": lambda f, x, v: vjp(f, x)[1](torch.tensor(-3.0, dtype=x.dtype))[0],
    "vmap": lambda f, x, v: vmap(f)(batch(x)),
    "vmap of grad": lambda f, x, v: vmap(grad(f))(batch(x)),
    "grad of vmap": lambda f, x, v: grad(lambda x: vmap(f)(batch(x)).prod())(x),
    "grad inside no_grad": inside_no_grad,
    "jacobian": lambda f, x, v: functional.jacobian(f, x),
}
FORWARD: dict[str, Transform] = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "jvp within jvp": within_another,
    "vmap of jvp": lambda f, x, v: vmap(lambda x: jvp(f, (x,), (v,))[1])(batch(x)),
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "linearize": lambda f, x, v: linearize(f, x)[1](v),
    "dual_level": dual,
    "dual_level with grad": lambda f, x, v: dual(f, x.clone().requires_grad_(), v).detach(),
    "dual_level of upstream": dual_upstream,
    "vectorised": lambda f, x, v: functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
}
SECOND: dict[str, Transform] = {
    "double backward": lambda f, x, v: functional.hvp(f, x, v)[1],
    "double backward by upstream": lambda f, x, v: functional.jvp(f, x, v)[1],
    "hessian": lambda f, x, v: hessian(f)(x),
    "forward over reverse": lambda f, x, v: jvp(grad(f), (x,), (v,))[1],
    "reverse over reverse": lambda f, x, v: grad(lambda x: (grad(f)(x) * v).sum())(x),
}
KINDS = {"reverse": REVERSE, "forward": FORWARD, "second": SECOND}
SCHEDULES = ("forward", "recompute", "none", "tap", "tap with value")


def function_of(problem: Problem, schedule: str, name: str, eager: bool) -> Function:
    """The loss as a function of one of its tensors, computed as `schedule` says, or eagerly."""
    leaves = {key: leaf.detach() for key, leaf in problem.leaves().items()}

    def function(x: Tensor) -> Tensor:
        hidden, anchor, *head = problem.arguments(leaves | {name: x})
        arguments: tuple[Any, ...] = (hidden, x if name == "anchor" else anchor, *head)
        loss = partial(eager_pre_loss if eager else fused_pre_loss, *arguments, **problem.options)
        if schedule == "none":
            each = loss(reduction="none")
            return (each * torch.arange(1, each.shape[0] + 1, dtype=each.dtype)).sum()
        if not schedule.startswith("tap"):
            return loss() if eager else loss(recompute=schedule == "recompute")
        if eager:
            return loss() + 0.1 * hidden.sum()
        value = schedule == "tap with value"
        tapped, scalar = pre_tap(*arguments, **problem.options, compute_value=value)
        return scalar + 0.1 * tapped.sum()

    return function


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """In float64, where right and wrong do not overlap."""
    depth, seed = draw(st.integers(0, 2)), draw(st.integers(0, 2**16))
    leading = draw(st.sampled_from(((6,), (2, 3))))
    problem = make_problem(
        leading, (4, 5, 4)[2 - depth :], seed=seed, dtype=torch.float64,
        bias=draw(st.booleans()), loss=draw(st.sampled_from(LOSS_NAMES)),
        activation=draw(st.sampled_from(ACTIVATION_NAMES)),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    selection = draw(st.sampled_from(("none", "mask", "index")))
    if selection == "mask":
        problem = problem.with_options(visual_mask=torch.rand(leading, generator=generator) < 0.6)
    elif selection == "index":
        count = draw(st.integers(0, 6))
        index = torch.randperm(6, generator=generator)[:count]
        problem = problem.with_options(visual_index=index)
    if draw(st.booleans()):
        weight = torch.rand(leading, generator=generator, dtype=torch.float64)
        problem = problem.with_options(token_weight=weight)
    return problem


def outcome(
    transform: Transform, function: Function, x: Tensor, v: Tensor
) -> Tensor | RuntimeError:
    try:
        return transform(function, x, v).detach()
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("kind", KINDS)
@fuzz(50)
@given(data=st.data(), problem=problems(), schedule=st.sampled_from(SCHEDULES))
def test_every_transform_is_right_or_raises(
    kind: str, data: st.DataObject, problem: Problem, schedule: str
) -> None:
    named = problem.leaves() | {"anchor": problem.anchor}
    name = data.draw(st.sampled_from(sorted(named)), label="argument")
    transform = KINDS[kind][data.draw(st.sampled_from(sorted(KINDS[kind])), label="transform")]
    x = named[name].detach()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    expected = outcome(transform, function_of(problem, schedule, name, True), x, v)
    result = outcome(transform, function_of(problem, schedule, name, False), x, v)
    if isinstance(result, Tensor):
        assert isinstance(expected, Tensor), f"eager raises {expected}"
        assert relative_error(result, expected) < 1e-9
    elif isinstance(expected, Tensor):  # a derivative that there is not
        assert kind != "reverse" and "eager_pre_loss" in str(result), result


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_raises(transform: str, schedule: str) -> None:
    function = function_of(make_problem((6,), (4, 3)), schedule, "hidden", False)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*eager_pre_loss"):
        FORWARD[transform](function, torch.randn(6, 4), torch.randn(6, 4))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_double_backward_by_the_upstream_gradient_raises(schedule: str) -> None:
    function = function_of(make_problem((6,), (4, 3)), schedule, "hidden", False)
    with pytest.raises(RuntimeError, match=r"no second derivative.*eager_pre_loss"):
        functional.jvp(function, torch.randn(6, 4), torch.randn(6, 4))


def test_tangents_of_what_is_constant_are_none_of_the_loss() -> None:
    """A level of forward mode for something else leaves the loss as it is."""
    problem = make_problem((6,), (4, 3))
    arguments = problem.arguments(problem.leaves())
    with forward_ad.dual_level():
        anchor = forward_ad.make_dual(problem.anchor, torch.ones_like(problem.anchor))
        loss = fused_pre_loss(arguments[0], anchor, *arguments[2:])
        assert forward_ad.unpack_dual(loss).tangent is None
    expected = eager_pre_loss(*arguments)
    assert relative_error(loss.detach(), expected.detach()) < 1e-6


@pytest.mark.parametrize("function", (eager_pre_loss, fused_pre_loss))
@pytest.mark.parametrize("name", ("visual_index", "token_weight", "denominator"))
def test_vmap_over_a_constant(function: Callable[..., Tensor], name: str) -> None:
    """Whose values are a batch's, so that none can be looked at."""
    problem = make_problem((6,), (4, 3), dtype=torch.float64)
    arguments = problem.arguments({k: x.detach() for k, x in problem.leaves().items()})
    values = {
        "visual_index": torch.tensor([[4, 0], [5, 1], [0, 3]]),
        "token_weight": torch.rand(3, 6, dtype=torch.float64),
        "denominator": torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64),
    }[name]
    losses = vmap(lambda value: function(*arguments, **{name: value}))(values)
    for loss, value in zip(losses, values, strict=True):
        assert relative_error(loss, eager_pre_loss(*arguments, **{name: value})) < 1e-9


@pytest.mark.parametrize("tap", (False, True))
def test_a_head_by_functional_call(tap: bool) -> None:
    """Gradients of each sample, as torch.func's users compute them."""
    problem = make_problem((3, 5), (4, 6), dtype=torch.float64, bias=False)
    head = PReHead(4, 6, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], hidden: Tensor, anchor: Tensor) -> Tensor:
        result = functional_call(head, parameters, (hidden, anchor), {"tap": tap})
        return result[1] if tap else result

    parameters = {name: x.detach() for name, x in head.named_parameters()}
    gradients = vmap(grad(loss), (None, 0, 0))(parameters, problem.hidden, problem.anchor)
    for sample in range(3):
        x, t = problem.hidden[sample], problem.anchor[sample]
        truth = eager_pre_loss(x, t, head.weights, head.biases)
        expected = torch.autograd.grad(truth, list(head.parameters()))
        for name, y in zip(parameters, expected, strict=True):
            assert relative_error(gradients[name][sample], y) < 1e-9


@pytest.mark.parametrize("transform", REVERSE | FORWARD | SECOND)
def test_pooling(transform: str) -> None:
    """It has all derivatives."""
    x, v = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    of_row, index = torch.tensor([0, 0, 0, 1]), torch.tensor([5, 0, 2, 3])

    def pooled(x: Tensor) -> Tensor:
        return pool_images(x, of_row, 2, index=index).pow(3).sum()

    def by_hand(x: Tensor) -> Tensor:
        return torch.stack((x[[5, 0, 2]].mean(dim=0), x[3])).pow(3).sum()

    both = [(REVERSE | FORWARD | SECOND)[transform](f, x, v).detach() for f in (pooled, by_hand)]
    assert relative_error(*both) < 1e-12 and both[1].abs().max() > 0


@pytest.mark.parametrize("schedule", ("forward", "tap"))
def test_compiled_transforms(schedule: str) -> None:
    """A full graph comes second: in a process whose first it is, torch 2.13's error is another."""
    problem = make_problem((6,), (4, 3), dtype=torch.float64)
    ours, eager = (function_of(problem, schedule, "hidden", eager) for eager in (False, True))
    x, v = (torch.randn(6, 4, dtype=torch.float64) for _ in range(2))
    for fullgraph in (False, True):
        gradient = torch.compile(grad(ours), fullgraph=fullgraph, backend="aot_eager")(x)
        assert relative_error(gradient, grad(eager)(x)) < 1e-9
        forward = torch.compile(
            lambda x, v: jvp(ours, (x,), (v,))[1], fullgraph=fullgraph, backend="aot_eager"
        )
        try:
            found = forward(x, v)
        except RuntimeError as error:
            assert re.search("no forward-mode derivative.*eager_pre_loss", str(error))
        else:  # torch 2.15 asks no function for its jvp here, and what computes the loss has one
            assert tuple(map(int, torch.__version__.split(".")[:2])) > (2, 13)
            assert relative_error(found, jvp(eager, (x,), (v,))[1]) < 1e-9


class Exported(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor], problem: Problem) -> None:
        super().__init__()
        self.function, self.anchor = function, problem.anchor
        self.weight = torch.nn.Parameter(problem.weights[0].clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.function(hidden, self.anchor, [self.weight])


def tapped_loss(*arguments: Any) -> Tensor:
    tapped, loss = pre_tap(*arguments)
    return loss + 0.1 * tapped.sum()


def pooled_loss(hidden: Tensor, *others: Any) -> Tensor:
    return eager_pre_loss(pool_images(hidden, torch.arange(6), 6), *others) + 0.1 * hidden.sum()


def plain_loss(hidden: Tensor, *others: Any) -> Tensor:
    return fused_pre_loss(hidden, *others) + 0.1 * hidden.sum()


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("function", (plain_loss, tapped_loss, pooled_loss))
def test_export(function: Callable[..., Tensor], strict: bool) -> None:
    """What is exported trains: its gradients are those of the loss."""
    problem = make_problem((6,), (4, 3), dtype=torch.float64, bias=False)
    module = Exported(function, problem)
    exported = torch.export.export(module, (torch.zeros_like(problem.hidden),), strict=strict)
    hidden = problem.hidden.clone().requires_grad_()
    loss = exported.module()(hidden)
    (weight,) = [x for name, x in exported.module().named_parameters() if name == "weight"]
    leaves = problem.leaves()
    expected = eager_pre_loss(*problem.arguments(leaves)) + 0.1 * leaves["hidden"].sum()
    assert relative_error(loss.detach(), expected.detach()) < 1e-9
    ours = torch.autograd.grad(loss, [hidden, weight])
    for x, y in zip(ours, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        assert relative_error(x, y) < 1e-9


def test_who_looks_at_an_op() -> None:
    """The tap's backward pass calls the implementation itself where nobody does."""
    x = torch.ones(2)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    assert is_plain(x, torch.nn.Parameter(x))
    assert not is_plain(x, x.as_subclass(type("Mine", (torch.Tensor,), {})))
    with Mode():
        assert not is_plain(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert not is_plain(x)
    seen = []

    def see(row: Tensor) -> Tensor:
        seen.append(is_plain(row))
        return row

    vmap(see)(torch.ones(2, 3))
    assert seen == [False]


def test_the_op_and_its_implementation_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(visual_index=torch.tensor([5, 0, 3]))
    results = []
    for plain in (True, False):
        monkeypatch.setattr(custom_ops, "is_plain", lambda *_, plain=plain: plain)
        hidden = problem.hidden.clone().requires_grad_()
        weights = [w.clone().requires_grad_() for w in problem.weights]
        tapped, loss = pre_tap(hidden, problem.anchor, weights, visual_index=torch.tensor([5, 0]))
        (tapped.sum() + loss).backward()
        results.append([hidden.grad, *(w.grad for w in weights)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
