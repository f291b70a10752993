# SPDX-License-Identifier: Apache-2.0
"""The emulation of fp8 matmuls: against torch's own, and without fp8 against the package."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.studies.fp8_accuracy import (
    BEHIND,
    BLOCK,
    E4M3,
    E5M2,
    MATMULS,
    SCHEMES,
    Step,
    bounds,
    by_name,
    judge,
    measure,
    print_table,
    quantise,
    quantised_operands,
    subsets,
)
from prereg_kernels.ops import custom_ops
from tests.helpers import make_problem, relative_error, run_tap, run_truth

NOTHING: frozenset[str] = frozenset()


def problem_of(dtype: torch.dtype = torch.bfloat16) -> object:
    return make_problem((50,), (32, 24, 40), dtype=dtype)


@pytest.mark.parametrize("granularity", ("tensor", "row", "block", "tile"))
@pytest.mark.parametrize("dtype", (E4M3, E5M2))
@pytest.mark.parametrize("dim", (0, 1))
def test_a_scale_for_each_slice(granularity: str, dtype: torch.dtype, dim: int) -> None:
    """Each reaches the largest number of the format; what is not tiny is rounded to its digits."""
    x = torch.randn(150, 300, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 30
    values, scale = quantise(x.bfloat16(), dim, dtype, granularity)
    assert values.dtype == dtype
    x = x.bfloat16().float()
    assert torch.equal(values.float(), (x / scale).to(dtype).float())

    reach = [1, 1]  # of one scale
    if granularity == "tensor":
        reach = list(x.shape)
    elif granularity == "row":
        reach[dim] = x.shape[dim]
    else:
        reach[dim] = BLOCK
        reach[1 - dim] = BLOCK if granularity == "tile" else 1
    for slices in itertools.product(*map(lambda n, r: range(0, n, r), x.shape, reach)):
        block = [slice(start, start + r) for start, r in zip(slices, reach, strict=True)]
        full = scale.expand_as(x)[block[0], block[1]]
        assert full.min() == full.max()
        assert values[block[0], block[1]].float().abs().max() == torch.finfo(dtype).max

    found, digits = values.float() * scale, 3 if dtype == E4M3 else 2
    large = x.abs() > scale * torch.finfo(dtype).tiny
    assert ((found - x).abs() <= x.abs() * 2.0 ** -(digits + 1) * 1.001)[large].all()
    assert large.float().mean() > 0.9


def test_zeros_stay_zeros() -> None:
    values, scale = quantise(torch.zeros(4, 3), 1, E4M3, "row")
    assert not values.float().any() and torch.equal(scale, torch.ones(4, 1))


@pytest.mark.parametrize("scheme", [x for x in SCHEMES if x.granularity in ("row", "tensor")])
@pytest.mark.parametrize("name", ("u", "dW2"))
def test_the_product_is_that_of_torch(name: str, scheme: object) -> None:
    """Where this CPU has one: up to float32's rounding."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(48, 64, generator=generator).bfloat16()
    b = torch.randn(64, 32, generator=generator).bfloat16()
    (a8, a_scale), (b8, b_scale) = quantised_operands(name, a, b, scheme)
    if scheme.granularity == "tensor":
        a_scale, b_scale = a_scale.squeeze(), b_scale.squeeze()
    b8 = b8.T.contiguous().T  # columns of unit stride, as the op wants them
    try:
        theirs = torch._scaled_mm(a8, b8, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no fp8 matmul here: {error}")
    assert (a8.dtype, b8.dtype) == (scheme.gradient if name == "dW2" else E4M3, E4M3)
    problem = make_problem((48,), (64, 32, 64))
    step = Step(problem, scheme)
    ours = step._multiply(name, frozenset((name,)), a.float(), b.float())
    assert relative_error(ours, theirs) < 1e-6
    assert 0.01 < relative_error(ours, a.double() @ b.double()) < 0.1


def test_without_fp8_it_is_the_package() -> None:
    problem = problem_of(torch.float64)
    truth, tap = by_name(run_truth(problem)), by_name(run_tap(problem))
    step = Step(problem, SCHEMES[0])
    for name, true in truth.items():
        ours = step.result(name, NOTHING)
        assert ours.dtype == tap[name].dtype
        assert relative_error(ours, true) <= 1e-12


def test_without_fp8_it_rounds_as_the_package_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16: no further from truth than the tap, which rounds at the same places, as it does
    wherever the processor multiplies bfloat16. Over some problems, as the loss, a single number,
    may be right by chance.
    """
    monkeypatch.setattr(custom_ops, "operand_dtype", lambda dtype, device: dtype)
    errors: dict[str, tuple[list[float], list[float]]] = {}
    for seed in range(8):
        problem = make_problem((50,), (32, 24, 40), dtype=torch.bfloat16, seed=seed)
        truth, tap = by_name(run_truth(problem)), by_name(run_tap(problem))
        step = Step(problem, SCHEMES[0])
        for name, true in truth.items():
            ours = step.result(name, NOTHING)
            assert ours.dtype == tap[name].dtype
            mine, its = errors.setdefault(name, ([], []))
            mine.append(relative_error(ours, true))
            its.append(relative_error(tap[name], true))
    for name, (mine, its) in errors.items():
        assert math.hypot(*mine) <= 1.3 * math.hypot(*its), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=[x.name for x in SCHEMES])
def test_a_result_depends_on_the_matmuls_behind_it(scheme: object) -> None:
    """Each of them alone changes it, the others do not; and what is shared is what is computed."""
    problem = problem_of()
    plain = Step(problem, scheme)
    for name, behind in BEHIND.items():
        for matmul in MATMULS:
            changed = Step(problem, scheme).result(name, frozenset((matmul,)))
            assert torch.equal(changed, plain.result(name, NOTHING)) == (matmul not in behind)
    truth = by_name(run_truth(problem))
    rows = judge(problem, scheme, truth)
    assert [frozenset(row["fp8"]) for row in rows] == list(subsets()) and len(rows) == 64
    for row in rows[:: len(rows) // 7]:
        for name in BEHIND:
            ours = Step(problem, scheme).result(name, frozenset(row["fp8"]))
            assert row[name]["error"] == pytest.approx(relative_error(ours, truth[name]), rel=1e-3)
    for name in BEHIND:
        assert 5 * rows[0][name]["error"] < rows[-1][name]["error"] < 0.15


def test_bounds() -> None:
    """k matmuls at twice the rate: 6 / (6 - k / 2) at most; and bytes, counted by hand."""
    for fp8 in subsets():
        bound = bounds(fp8)
        assert math.isclose(bound["matmuls"], 6 / (6 - len(fp8) / 2), rel_tol=1e-3)
        assert bound["bytes"] <= bound["matmuls"] or not fp8
    # h and du: two bytes read, one written; in units of 989e12 flops
    tokens, width = 1000, 100
    flops, rate = 2 * tokens * width**2, 989e12
    passes = (24 * tokens * width + 32 * width**2) / 4.8e12
    floor = 6 * flops / rate
    time = 5 * flops / rate + flops / 1979e12 + passes + 6 * tokens * width / 4.8e12
    found = bounds(frozenset(("dW1",)), tokens, width)["bytes"]
    assert math.isclose(found, (floor + passes) / time)


def test_a_tiny_run(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [measure(64, 100, steps, rows=50) for steps in (0, 30)]
    assert abs(cases[0]["cosine"]) < 0.5 < cases[1]["cosine"] < 1
    assert all(x["cosine"] > 0.999 for case in cases for x in case["bfloat16"].values())
    machine = {"device": "-", "torch": "-", "commit": "-", "dirty": True}
    print_table({"cases": cases, "machine": machine})
    printed = capsys.readouterr().out
    assert printed.count("\n| ") > 15 and "all six | 2.00x" in printed and "(dirty)" in printed
