# SPDX-License-Identifier: Apache-2.0
"""fused_pre_loss: numbers at ordinary sizes, gradcheck, and what it promises about its tensors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prereg_kernels import eager_pre_loss, fused_pre_loss, pre_tap
from prereg_kernels.ops import arguments
from tests.helpers import (
    ACTIVATION_NAMES,
    assert_as_good_as_eager,
    assert_as_good_on_average,
    assert_one_rounding_from_eager,
    call_tensors,
    check,
    make_problem,
    relative_error,
    residual_like,
    run,
    run_tap,
    run_truth,
)

LOSSES = (
    ("cosine", "none"), ("mse", "none"), ("mse", "l2"), ("mse", "layer"),
    ("smooth_l1", "none"), ("smooth_l1", "l2"), ("smooth_l1", "layer"),
    ("l1", "none"), ("l1", "l2"), ("l1", "layer"), ("huber", "none"), ("huber", "layer"),
)  # fmt: skip
SCHEDULES = ("forward", "recompute", "tap")
PAIRS = list(itertools.combinations(("hidden", "W0", "b0", "W1", "b1"), 2))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run_schedule(schedule: str, problem, factor: float = 1.0, **options) -> dict[str, Tensor]:
    if schedule == "tap":
        return run_tap(problem, factor, **options)
    return run(fused_pre_loss, problem, factor, recompute=schedule == "recompute", **options)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss, normalize", (("cosine", "none"), ("mse", "none"), ("mse", "layer")))
@pytest.mark.parametrize("chunk_rows", (None, 128))
def test_rule_without_luck(
    schedule: str, dtype: torch.dtype, loss: str, normalize: str, chunk_rows: int | None
) -> None:
    """At a size where luck averages out, in a single comparison."""
    problem = make_problem((512,), (96, 80, 64), dtype=dtype, loss=loss, normalize=normalize)
    factor = 1024.0 if dtype == torch.float16 else 0.5
    assert_as_good_as_eager(
        lambda problem: run_schedule(schedule, problem, factor, chunk_rows=chunk_rows),
        problem, factor, strict=True,
    )  # fmt: skip


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss, normalize", (("cosine", "none"), ("mse", "none"), ("mse", "layer")))
def test_rule_near_the_anchor(schedule: str, dtype: torch.dtype, loss: str, normalize: str) -> None:
    """A cosine near 1, where training lives, and the gradient is a small difference.

    Its error is that of the prediction, the same for all, and large: what is left to compare is
    luck in a single problem, at any size.
    """
    problems = [
        make_problem(
            (512,), (96, 80, 64), seed=seed, dtype=dtype, noise=0.01, loss=loss, normalize=normalize
        )
        for seed in range(8)
    ]
    if loss == "cosine":
        assert run_truth(problems[0])["loss"] < -0.999
    factor = 1024.0 if dtype == torch.float16 else 0.5
    assert_as_good_on_average(
        lambda problem: run_schedule(schedule, problem, factor, chunk_rows=200), problems, factor
    )


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_gradients_are_one_rounding_from_eager(dtype: torch.dtype) -> None:
    """The documented limit of the schedule that stores its gradients, and of that one alone."""
    factor = 0.37 * 1024 if dtype == torch.float16 else 0.37
    problems = [make_problem((2048,), (96, 80, 64), seed=seed, dtype=dtype) for seed in range(8)]
    for problem in problems[:2]:
        assert_one_rounding_from_eager(
            lambda problem: run_schedule("forward", problem, factor), problem, factor
        )
    for schedule in ("recompute", "tap"):
        assert_as_good_on_average(
            lambda problem, schedule=schedule: run_schedule(schedule, problem, factor),
            problems, factor,
        )  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss, normalize", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_gradcheck(schedule: str, loss: str, normalize: str, activation: str) -> None:
    problem = make_problem(
        (5,), (3, 4, 5), dtype=torch.float64, loss=loss, normalize=normalize,
        activation=activation, visual_index=torch.tensor([4, 0, 3]), chunk_rows=2,
    )  # fmt: skip
    leaves = problem.leaves()

    def function(*tensors: Tensor) -> Tensor:
        arguments = problem.arguments(dict(zip(leaves, tensors, strict=True)))
        if schedule == "tap":
            tapped, value = pre_tap(*arguments, **problem.options, compute_value=True)
            return value + tapped.square().sum()
        recompute = schedule == "recompute"
        return fused_pre_loss(*arguments, **problem.options, recompute=recompute)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("depth", (0, 1, 3))
def test_gradcheck_of_single_tokens(depth: int) -> None:
    problem = make_problem((4,), (5,) * (depth + 1), dtype=torch.float64, reduction="none")
    leaves = problem.leaves()

    def function(*tensors: Tensor) -> Tensor:
        arguments = problem.arguments(dict(zip(leaves, tensors, strict=True)))
        return fused_pre_loss(*arguments, **problem.options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(schedule: str, dtype: torch.dtype) -> None:
    problem = make_problem((300,), (40, 33, 21), dtype=dtype, chunk_rows=64)
    first, second = (run_schedule(schedule, problem) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_second_backward_equals_the_first(schedule: str) -> None:
    problem = make_problem((9,))
    leaves = problem.leaves()
    if schedule == "tap":
        loss = pre_tap(*problem.arguments(leaves))[1]
    else:
        loss = fused_pre_loss(*problem.arguments(leaves), recompute=schedule == "recompute")
    first = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(3.0))
    assert all(map(torch.equal, first, second))
    assert first[0].abs().max() > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ("hidden", "W0", "b1"))
def test_double_backward_raises(schedule: str, name: str) -> None:
    problem = make_problem((9,))
    leaves = problem.leaves()
    if schedule == "tap":
        tapped, loss = pre_tap(*problem.arguments(leaves))
        loss = loss + tapped.square().sum()
    else:
        loss = fused_pre_loss(*problem.arguments(leaves), recompute=schedule == "recompute")
    (gradient,) = torch.autograd.grad(loss, leaves[name], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("needs", PAIRS)
def test_only_required_gradients(schedule: str, needs: tuple[str, ...]) -> None:
    problem = make_problem((9,))
    everything = run_schedule(schedule, problem)
    some = run_schedule(schedule, replace(problem, needs=frozenset(needs)))
    assert some.keys() == {"loss", *(f"d{name}" for name in needs)}
    assert all(torch.equal(some[name], everything[name]) for name in some)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", ((8,), (8, 8), (8, 6, 7)), ids=len)
@pytest.mark.parametrize("indexed", (False, True))
def test_no_tensor_of_the_caller_is_written(
    schedule: str, dtype: torch.dtype, widths: tuple[int, ...], indexed: bool
) -> None:
    problem = make_problem((3, 4), widths, dtype=dtype, token_weight=torch.rand(3, 4))
    if indexed:
        problem = problem.with_options(visual_index=torch.tensor([7, 2, 11]))
    before = [x.clone() for x in call_tensors(problem)]
    if schedule == "tap":
        residual = residual_like(problem.hidden)
        kept = residual.clone()
        run_tap(problem, 2.0, residual)
        assert torch.equal(residual, kept)
    else:
        run_schedule(schedule, problem, 2.0)
    assert all(map(torch.equal, call_tensors(problem), before))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selector", ("visual_mask", "visual_index"))
@pytest.mark.parametrize("depth", (0, 2))
def test_zero_tokens(schedule: str, dtype: torch.dtype, selector: str, depth: int) -> None:
    problem = make_problem((2, 3), (6,) * (depth + 1), dtype=dtype)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    nothing = nothing if selector == "visual_mask" else torch.zeros(0, dtype=torch.int64)
    results = run_schedule(schedule, problem.with_options(**{selector: nothing}))
    assert results.keys() == {"loss", *(f"d{name}" for name in problem.leaves())}
    for name, x in results.items():
        assert torch.count_nonzero(x) == 0 and x.isfinite().all(), name


@pytest.mark.parametrize("schedule", (*SCHEDULES, "eager"))
@pytest.mark.parametrize("weighted", (False, True))
def test_a_mask_without_tokens_and_a_denominator_of_zero(schedule: str, weighted: bool) -> None:
    """A step without visual tokens counts 0 of them."""
    problem = make_problem((2, 3), visual_mask=torch.zeros(2, 3, dtype=torch.bool))
    problem = problem.with_options(denominator=torch.tensor(0.0))
    if weighted:
        problem = problem.with_options(token_weight=torch.ones(2, 3))
    eager = schedule == "eager"
    results = run(eager_pre_loss, problem) if eager else run_schedule(schedule, problem)
    assert results.keys() == {"loss", *(f"d{name}" for name in problem.leaves())}
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results.values())


@pytest.mark.parametrize("schedule", (*SCHEDULES, "eager"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("selector", (None, "visual_mask", "visual_index"))
def test_a_denominator_of_zero_that_cannot_be_seen(
    schedule: str, dtype: torch.dtype, weighted: bool, selector: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On a GPU, and in a graph: nothing, rather than infinity in every weight."""
    monkeypatch.setattr(arguments, "_values_readable", lambda _: False)
    select = {
        None: {}, "visual_mask": {"visual_mask": torch.arange(6).view(2, 3) % 2 == 0},
        "visual_index": {"visual_index": torch.tensor([4, 1])},
    }[selector]  # fmt: skip
    problem = make_problem((2, 3), dtype=dtype, denominator=torch.tensor(0), **select)
    if weighted:
        problem = problem.with_options(token_weight=torch.rand(2, 3))
    eager = schedule == "eager"
    results = run(eager_pre_loss, problem) if eager else run_schedule(schedule, problem)
    assert results.keys() == {"loss", *(f"d{name}" for name in problem.leaves())}
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results.values())


@pytest.mark.parametrize("schedule", (*SCHEDULES, "eager"))
def test_a_denominator_that_is_not_a_number_shows(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "_values_readable", lambda _: False)
    problem = make_problem((6,), denominator=torch.tensor(float("nan")))
    eager = schedule == "eager"
    results = run(eager_pre_loss, problem) if eager else run_schedule(schedule, problem)
    assert all(x.isnan().all() for x in results.values())


@pytest.mark.parametrize("schedule", (*SCHEDULES, "eager"))
def test_token_weights_and_a_denominator_of_zero(schedule: str) -> None:
    """Nothing weighs anything: 0 is what the step's weights add up to."""
    problem = make_problem((6,), denominator=torch.tensor(0.0), token_weight=torch.zeros(6))
    eager = schedule == "eager"
    results = run(eager_pre_loss, problem) if eager else run_schedule(schedule, problem)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("of", (torch.float64, torch.int64, torch.bfloat16), ids=str)
def test_the_dtype_of_the_denominator_is_not_that_of_the_result(
    schedule: str, of: torch.dtype
) -> None:
    plain = run_schedule(schedule, make_problem((6,), denominator=torch.tensor(8.0)))
    results = run_schedule(schedule, make_problem((6,), denominator=torch.tensor(8, dtype=of)))
    assert results["loss"].dtype == torch.float32
    assert all(torch.equal(results[name], plain[name]) for name in plain)


@pytest.mark.parametrize("function", (fused_pre_loss, eager_pre_loss))
@pytest.mark.parametrize("selected", (False, True))
def test_the_dtype_of_token_weights_is_not_that_of_the_result(function, selected: bool) -> None:
    options = {"visual_mask": torch.arange(7) % 2 == 0} if selected else {}
    weight = torch.rand(7, dtype=torch.float64)
    problem = make_problem((7,), reduction="none", **options)
    plain = run(function, problem)
    results = run(function, problem.with_options(token_weight=weight))
    assert results["loss"].dtype == torch.float32
    expected = plain["loss"].double() * (weight[::2] if selected else weight)
    assert relative_error(results["loss"], expected) < 1e-6


@pytest.mark.parametrize("schedule", (*SCHEDULES, "eager"))
def test_parameter_lists(schedule: str) -> None:
    problem = make_problem((7,))
    function = {"tap": pre_tap, "eager": eager_pre_loss}.get(schedule, fused_pre_loss)
    options = {"recompute": True} if schedule == "recompute" else {}
    gradients = []
    for kind in (list, torch.nn.ParameterList):
        weights = kind([torch.nn.Parameter(w) for w in problem.weights])
        biases = kind([torch.nn.Parameter(b) for b in problem.biases])
        result = function(problem.hidden, problem.anchor, weights, biases, **options)
        (result[1] if schedule == "tap" else result).backward()
        gradients.append([p.grad for p in (*weights, *biases)])
    assert all(map(torch.equal, *gradients))
    assert min(g.abs().max() for g in gradients[0]) > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_token_weights(schedule: str) -> None:
    results = run_schedule(schedule, make_problem((7,), token_weight=torch.zeros(7)))
    assert all(torch.count_nonzero(x) == 0 for x in results.values())


@pytest.mark.parametrize("loss, normalize", (("cosine", "none"), ("mse", "l2"), ("mse", "layer")))
@pytest.mark.parametrize("eps", (1e-8, 0.5, 1e3))
def test_zero_and_short_rows(loss: str, normalize: str, eps: float) -> None:
    """Where |z| < eps the norm is the constant eps."""
    problem = make_problem((6,), (5,), loss=loss, normalize=normalize, eps=eps)
    problem.hidden[0] = 0
    problem.hidden[1] *= 0.1
    problem.anchor[2] = 0
    results = check(problem)
    if loss == "cosine":
        z, t = problem.hidden[0].double(), problem.anchor[0].double()
        expected = -(t / max(t.norm(), torch.tensor(eps).double())) / eps / 6
        assert z.count_nonzero() == 0
        assert relative_error(results["dhidden"][0], expected) < 1e-6


@pytest.mark.usefixtures("products")
def test_float16_does_not_underflow() -> None:
    """1/N of many tokens is subnormal in float16; the sums over the tokens are not."""
    problem = make_problem((4096,), (8, 8, 8), dtype=torch.float16, loss="mse", denominator=3e5)
    truth = run_truth(problem)
    eager = run(eager_pre_loss, problem)
    for schedule in SCHEDULES:
        fused = run_schedule(schedule, problem)
        for name in ("dW0", "db0", "dW1", "db1"):
            error = relative_error(fused[name], truth[name])
            assert error < 0.5 * relative_error(eager[name], truth[name]), (schedule, name)


@pytest.mark.usefixtures("products")
def test_float16_gradients_without_a_head_are_rounded_once() -> None:
    """Subnormal, and no operands of a matmul: scaled and scaled back, they are rounded twice."""
    problems = [make_problem((257,), (160,), seed=seed, dtype=torch.float16) for seed in range(8)]
    for schedule in ("recompute", "tap"):
        assert_as_good_on_average(
            lambda problem, schedule=schedule: run_schedule(schedule, problem), problems
        )


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_rows", (1, 7, 50, 64))
def test_chunk_size_does_not_matter(dtype: torch.dtype, chunk_rows: int) -> None:
    problem = make_problem((50,), (24, 20, 16), dtype=dtype)
    check(problem, chunk_rows=chunk_rows, factor=1024.0 if dtype == torch.float16 else 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("selector", ("visual_mask", "visual_index"))
def test_nan_at_other_positions_does_not_leak(schedule: str, selector: str) -> None:
    problem = make_problem((8,))
    visual = torch.tensor([1, 4, 6])
    mask = torch.zeros(8, dtype=torch.bool).index_fill(0, visual, True)
    problem = problem.with_options(**{selector: mask if selector == "visual_mask" else visual})
    clean = run_schedule(schedule, problem)
    problem.hidden[~mask] = float("nan")
    problem.anchor[~mask] = float("nan")
    poisoned = run_schedule(schedule, problem)
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)
    assert torch.count_nonzero(poisoned["dhidden"][~mask]) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nan_at_a_visual_position_shows(schedule: str) -> None:
    problem = make_problem((8,))
    problem.hidden[3, 2] = float("nan")
    results = run_schedule(schedule, problem)
    assert results["loss"].isnan()
    assert results["dhidden"].isnan().any(dim=1).tolist() == [row == 3 for row in range(8)]


def test_no_gradient_reaches_the_anchor() -> None:
    problem = make_problem((8,))
    anchor = problem.anchor.clone().requires_grad_()
    hidden = problem.hidden.clone().requires_grad_()
    for recompute in (False, True):
        arguments = (hidden, anchor, problem.weights, problem.biases)
        fused_pre_loss(*arguments, recompute=recompute).backward()
        assert anchor.grad is None
        assert hidden.grad is not None and hidden.grad.abs().max() > 0


def test_without_grad_the_value_is_the_same() -> None:
    problem = make_problem((30,))
    with_grad = run(fused_pre_loss, problem)["loss"]
    with torch.no_grad():
        value = fused_pre_loss(*problem.arguments(problem.leaves()))
    assert not value.requires_grad
    assert relative_error(value, with_grad.double()) < 1e-6


def test_the_paper_formula() -> None:
    """-(1/N) sum_i cos(f(h_i), t_i), by torch's own cosine."""
    problem = make_problem((4, 9), dtype=torch.float64, visual_mask=torch.rand(4, 9) < 0.5)
    hidden, anchor, (w1, w2), (b1, b2) = problem.arguments(problem.leaves())
    mask = problem.options["visual_mask"]
    z = torch.nn.functional.gelu(hidden[mask] @ w1.T + b1) @ w2.T + b2
    expected = -torch.nn.functional.cosine_similarity(z, anchor[mask], dim=-1).mean()
    for function in (eager_pre_loss, fused_pre_loss):
        value = function(hidden, anchor, (w1, w2), (b1, b2), visual_mask=mask)
        assert relative_error(value.detach(), expected.detach()) < 1e-12


def test_reductions_and_weights_by_hand() -> None:
    hidden, anchor = torch.eye(3), torch.ones(3, 3)
    cosine = 3**-0.5
    weight = torch.tensor([1.0, 0.0, 3.0])

    def value(**options: object) -> list[float] | float:
        return fused_pre_loss(hidden, anchor, **options).tolist()  # type: ignore[arg-type]

    assert value() == pytest.approx(-cosine)
    assert value(reduction="sum") == pytest.approx(-3 * cosine)
    assert value(reduction="none") == pytest.approx([-cosine] * 3)
    assert value(denominator=12) == pytest.approx(-3 * cosine / 12)
    assert value(token_weight=weight) == pytest.approx(-cosine)
    assert value(token_weight=weight, denominator=8) == pytest.approx(-4 * cosine / 8)
    assert value(token_weight=weight, reduction="sum") == pytest.approx(-4 * cosine)
    assert value(token_weight=weight, reduction="none") == pytest.approx([-cosine, 0, -3 * cosine])
    index = torch.tensor([2, 1])
    assert value(token_weight=weight, reduction="none", visual_index=index) == pytest.approx(
        [-3 * cosine, 0]
    )
