# SPDX-License-Identifier: Apache-2.0
"""A generated sweep over everything that the loss takes, in its three gradient schedules."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from prereg_kernels.ops import dtypes
from prereg_kernels.ops.names import NORMALIZATIONS
from tests.fuzzing import fuzz
from tests.helpers import (
    ACTIVATION_NAMES,
    LOSS_NAMES,
    Problem,
    check,
    check_tap,
    make_problem,
    residual_like,
    restride,
)

LOW = (torch.bfloat16, torch.float16)
FLAVOURS = st.sampled_from(
    [  # hidden, weights, autocast
        (torch.float64, torch.float64, None),
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float16, torch.float16, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float16, torch.float32, None),
        (torch.float32, torch.bfloat16, None),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.bfloat16),
    ]
)
STRIDES = ("contiguous", "transposed", "sliced", "expanded")


def low_precision(problem: Problem) -> bool:
    leaves = problem.leaves().values()
    return problem.autocast is not None or any(leaf.dtype in LOW for leaf in leaves)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    sizes = st.integers(1, 40)
    leading = draw(
        st.one_of(
            st.tuples(st.integers(1, 48)),
            st.tuples(st.integers(1, 6), st.integers(1, 12)),
            st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
        )
    )
    depth = draw(st.integers(0, 3))
    loss = draw(st.sampled_from(LOSS_NAMES))
    normalize = "none" if loss == "cosine" else draw(st.sampled_from(NORMALIZATIONS))
    # Below three features a normalised vector can hardly move: the gradient is rounding alone
    least = 1 if loss != "cosine" and normalize == "none" else 3
    features = draw(st.integers(least, 40))
    widths = (*(draw(sizes) for _ in range(depth)), features)
    dtype, weight_dtype, autocast = draw(FLAVOURS)
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    problem = make_problem(
        leading, widths, seed=seed, dtype=dtype, weight_dtype=weight_dtype,
        bias=draw(st.booleans()), loss=loss, normalize=normalize,
        activation=draw(st.sampled_from(ACTIVATION_NAMES)),
    )  # fmt: skip
    options: dict[str, Any] = {}
    positions = count = math.prod(leading)
    anchor = restride(problem.anchor, draw(st.sampled_from(STRIDES)))

    selection = draw(st.sampled_from(("none", "mask", "index")))
    if selection != "none":
        count = draw(st.integers(0, positions))
        chosen = torch.randperm(positions, generator=generator)[:count]
        if selection == "mask":
            mask = torch.zeros(positions, dtype=torch.bool)
            mask[chosen] = True
            options["visual_mask"] = mask.reshape(leading)
            chosen = mask.nonzero().squeeze(1)
        else:
            options["visual_index"] = chosen
        if draw(st.booleans()):
            anchor = anchor.reshape(positions, -1)[chosen]
    anchor = anchor.to(draw(st.sampled_from((anchor.dtype, torch.float32))))

    weight = draw(st.sampled_from((None, leading, (count,))))
    if weight is not None:
        options["token_weight"] = torch.rand(weight, generator=generator).to(
            draw(st.sampled_from((torch.float32, dtype)))
        )
    options["reduction"] = draw(st.sampled_from(("mean", "mean", "sum", "none")))
    denominator = draw(st.sampled_from((None, None, 7, 12.5, torch.tensor(9.0))))
    if options["reduction"] == "mean" and denominator is not None:
        options["denominator"] = denominator
    biases = problem.biases
    if biases is not None and draw(st.booleans()):
        biases = [None if draw(st.booleans()) else bias for bias in biases]
    names = sorted(replace(problem, biases=biases).leaves())
    needs = draw(st.one_of(st.none(), st.frozensets(st.sampled_from(names))))
    return Problem(
        restride(problem.hidden, draw(st.sampled_from(STRIDES))),
        anchor,
        problem.weights,
        biases,
        problem.options | options,
        autocast,
        needs,
    )


@fuzz(250)
@given(
    problem=problems(),
    chunk_rows=st.one_of(st.none(), st.integers(1, 20)),
    power=st.sampled_from((1.0, 0.5, -4.0)),
    factor=st.sampled_from((1.0, 0.37, -3.1)),
    native=st.booleans(),
)
def test_every_schedule_is_as_good_as_eager(
    problem: Problem, chunk_rows: int | None, power: float, factor: float, native: bool
) -> None:
    """On a CPU with arithmetic of low precision as on one without."""
    with mock.patch.object(dtypes, "_native_on_cpu", lambda _: native):
        check_schedules(problem, chunk_rows, power, factor)


def check_schedules(problem: Problem, chunk_rows: int | None, power: float, factor: float) -> None:
    # Gradients stored by the forward pass are in their final dtype: powers of two scale exactly
    stored = power if low_precision(problem) else factor
    if torch.float16 in (problem.hidden.dtype, *(w.dtype for w in problem.weights)):
        stored = power * 2**10  # as loss scaling does: what is subnormal does not scale exactly
    check(problem, factor=stored, chunk_rows=chunk_rows)
    check(problem, factor=factor, chunk_rows=chunk_rows, recompute=True)
    if problem.options["reduction"] == "mean":
        options = {k: v for k, v in problem.options.items() if k != "reduction"}
        tap = replace(problem, options=options)
        check_tap(tap, factor, chunk_rows=chunk_rows, compute_value=True)
        check_tap(tap, factor, residual_like(tap.hidden), chunk_rows=chunk_rows, compute_value=True)
