# SPDX-License-Identifier: Apache-2.0
"""Tensors that are written between forward and backward: the gradients of before, or an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap
from prereg_kernels.attach.pooling import pool_images
from tests.fuzzing import fuzz
from tests.helpers import Problem, make_problem, restride

SCHEDULES = ("forward", "recompute", "none", "tap", "tap with value")
# What eager autograd copies, or does not read in backward, and the fused loss may read there.
READ_LATE = ("anchor", "b0", "b1", "hidden", "W0", "W1")
WRITTEN = r"was modified in place|modified by an inplace operation"


def tensors_of(problem: Problem, how: str) -> dict[str, Tensor]:
    """Copies of all tensors of the call, by name; what is no vector gets other strides."""
    named = {name: x.detach() for name, x in problem.leaves().items()} | {"anchor": problem.anchor}
    named |= {k: v for k, v in problem.options.items() if isinstance(v, Tensor)}
    copies = {
        k: restride(v.clone(), how if v.dim() > 1 else "contiguous") for k, v in named.items()
    }
    return {k: copies[k].requires_grad_(k in problem.leaves()) for k in copies}


def loss_of(problem: Problem, tensors: dict[str, Tensor], schedule: str, eager: bool) -> Tensor:
    options = {k: tensors.get(k, v) for k, v in problem.options.items()}
    hidden, _, *head = problem.arguments(tensors)
    arguments = (hidden, tensors["anchor"], *head)
    if schedule.startswith("tap") and not eager:
        value = schedule == "tap with value"
        tapped, loss = pre_tap(*arguments, **options, compute_value=value)
        return loss + 0.1 * tapped.sum()
    function: Callable[..., Tensor] = eager_pre_loss if eager else fused_pre_loss
    if schedule == "recompute" and not eager:
        function = partial(function, recompute=True)
    if schedule != "none":
        return function(*arguments, **options)
    options.pop("denominator", None)
    each = function(*arguments, **options, reduction="none")
    return (each * torch.arange(1, each.shape[0] + 1, dtype=each.dtype)).sum()


def write(x: Tensor) -> None:
    """Other values, as legal as the old ones."""
    with torch.no_grad():
        if x.dtype == torch.bool:
            x.logical_not_()
        elif x.dtype == torch.int64:
            x.copy_(x.flip(0))
        else:
            x.mul_(2.0)


def gradients(
    problem: Problem, how: str, schedule: str, eager: bool, written: str | None, again: bool
) -> list[Tensor] | str:
    """Of every leaf, or the error's text; `again`: of a second backward, the write before it."""
    tensors = tensors_of(problem, how)
    loss = loss_of(problem, tensors, schedule, eager)
    leaves = [tensors[name] for name in problem.leaves()]
    if again:
        torch.autograd.grad(loss, leaves, retain_graph=True)
    if written is not None:
        write(tensors[written])
    try:
        return list(torch.autograd.grad(loss, leaves))
    except RuntimeError as error:
        return str(error)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    leading = draw(st.sampled_from(((12,), (3, 4), (2, 3, 2))))
    seed, depth = draw(st.integers(0, 2**16)), draw(st.integers(0, 2))
    problem = make_problem(
        leading, (5, 7, 5)[2 - depth :], seed=seed, bias=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))),
        loss=draw(st.sampled_from(("cosine", "mse"))),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    count = draw(st.integers(2, 10))
    chosen = torch.randperm(12, generator=generator)[:count]
    selection = draw(st.sampled_from(("none", "mask", "index")))
    if selection == "mask":
        mask = torch.zeros(12, dtype=torch.bool).index_fill(0, chosen, True)
        problem = problem.with_options(visual_mask=mask.view(leading))
    elif selection == "index":
        problem = problem.with_options(visual_index=chosen)
    if draw(st.booleans()):
        problem = problem.with_options(token_weight=torch.rand(leading, generator=generator))
    if draw(st.booleans()):
        problem = problem.with_options(denominator=torch.tensor(7.0))
    return problem


@fuzz(150)
@given(
    data=st.data(),
    problem=problems(),
    schedule=st.sampled_from(SCHEDULES),
    how=st.sampled_from(("contiguous", "transposed", "sliced")),
    again=st.booleans(),
)
def test_gradients_are_those_of_before_or_raise(
    data: st.DataObject, problem: Problem, schedule: str, how: str, again: bool
) -> None:
    written = data.draw(st.sampled_from((None, *tensors_of(problem, how))), label="written")
    run = partial(gradients, problem, how, schedule, again=again)
    ours = run(eager=False, written=written)
    if isinstance(ours, str):
        assert "in place" in ours or "inplace operation" in ours
        assert written in READ_LATE or isinstance(run(eager=True, written=written), str)
    else:
        before = run(eager=False, written=None)
        assert all(map(torch.equal, ours, before))


@pytest.mark.parametrize("name", ("anchor", "visual_mask", "visual_index"))
@pytest.mark.parametrize("saved", ("plain", "on the CPU", "checkpointed"))
def test_the_tap_names_what_was_written(name: str, saved: str) -> None:
    """Also where autograd's own check is off: for what goes through hooks of saved tensors."""
    index = torch.tensor([4, 0, 7])
    mask = torch.zeros(9, dtype=torch.bool).index_fill(0, index, True)
    select = {"visual_mask": mask} if name == "visual_mask" else {"visual_index": index}
    problem = make_problem((9,), **select)
    tensors = tensors_of(problem, "contiguous")
    loss = partial(loss_of, problem, tensors, "tap", False)
    if saved == "checkpointed":
        loss = partial(checkpoint, loss, use_reentrant=False)
    if saved == "on the CPU":
        with save_on_cpu():
            total = loss()
    else:
        total = loss()
    write(tensors[name])
    with pytest.raises(RuntimeError, match=f"^{name}: was modified in place between"):
        total.backward()
    assert all(tensors[leaf].grad is None for leaf in problem.leaves())


@pytest.mark.parametrize("name", ("anchor", "visual_mask", "visual_index"))
def test_a_compiled_tap(name: str) -> None:
    index = torch.tensor([4, 0, 7])
    mask = torch.zeros(9, dtype=torch.bool).index_fill(0, index, True)
    select = {"visual_mask": mask} if name == "visual_mask" else {"visual_index": index}
    problem = make_problem((9,), **select)
    tensors = tensors_of(problem, "contiguous")
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    total = compiled(problem, tensors, "tap", False)
    write(tensors[name])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("name", ("image_of_row", "index"))
def test_pooling(name: str) -> None:
    x = torch.randn(5, 3, requires_grad=True)
    constants = {"image_of_row": torch.tensor([0, 0, 1]), "index": torch.tensor([4, 0, 1])}
    means = pool_images(x, constants["image_of_row"], 2, index=constants["index"])
    write(constants[name])
    with pytest.raises(RuntimeError, match=f"^{name}: was modified in place between"):
        means.sum().backward()


@pytest.mark.parametrize("function", (fused_pre_loss, pre_tap, eager_pre_loss))
@pytest.mark.parametrize("name", ("anchor", "visual_mask", "visual_index", "token_weight"))
def test_constants_of_inference_mode(function: Callable[..., Any], name: str) -> None:
    """They count no writes; the loss is right with them, or torch's own error says what to do."""
    index = torch.tensor([4, 0, 7])
    mask = torch.zeros(9, dtype=torch.bool).index_fill(0, index, True)
    select = {"visual_mask": mask} if name == "visual_mask" else {"visual_index": index}
    problem = make_problem((9,), token_weight=torch.rand(9), **select)
    before = gradients(problem, "contiguous", "forward", True, None, False)
    tensors = tensors_of(problem, "contiguous")
    with torch.inference_mode():
        tensors[name] = tensors[name].clone()
    hidden, _, *head = problem.arguments(tensors)
    options = {k: tensors.get(k, v) for k, v in problem.options.items()}
    leaves = [tensors[leaf] for leaf in problem.leaves()]
    try:
        result = function(hidden, tensors["anchor"], *head, **options)
    except RuntimeError as error:
        assert function is eager_pre_loss and "Inference tensors cannot be saved" in str(error)
        return
    loss = result[1] if isinstance(result, tuple) else result
    for ours, x in zip(torch.autograd.grad(loss, leaves), before, strict=True):
        torch.testing.assert_close(ours, x)


@pytest.mark.parametrize("inside", (False, True), ids=("normal tensors", "inference tensors"))
@pytest.mark.parametrize("select", ("visual_mask", "visual_index"))
def test_under_inference_mode(inside: bool, select: str) -> None:
    index = torch.tensor([4, 0, 7])
    mask = torch.zeros(9, dtype=torch.bool).index_fill(0, index, True)
    problem = make_problem((9,), **{select: mask if select == "visual_mask" else index})
    expected = loss_of(problem, tensors_of(problem, "contiguous"), "forward", True)
    tensors = tensors_of(problem, "contiguous")
    with torch.inference_mode():
        if inside:
            tensors = tensors_of(problem, "contiguous")
        for schedule in ("forward", "recompute"):
            loss = loss_of(problem, tensors, schedule, False)
            torch.testing.assert_close(loss.clone(), expected)
        hidden, _, *head = problem.arguments(tensors)
        options = {select: tensors[select]}
        for value in (False, True):
            tapped, loss = pre_tap(hidden, tensors["anchor"], *head, **options, compute_value=value)
            assert torch.equal(tapped, hidden)
            torch.testing.assert_close(loss, expected if value else torch.zeros(()))


def test_token_weights_of_single_losses() -> None:
    """Under a mask the losses are multiplied by copies, so that weights may change, as in eager."""
    mask = torch.arange(12) % 3 == 0
    problem = make_problem((12,), visual_mask=mask, token_weight=torch.rand(12))
    before, after, eager = (
        gradients(problem, "contiguous", "none", eager, written, False)
        for eager, written in ((False, None), (False, "token_weight"), (True, "token_weight"))
    )
    assert all(map(torch.equal, before, after))
    for ours, expected in zip(after, eager, strict=True):
        torch.testing.assert_close(ours, expected)
