# SPDX-License-Identifier: Apache-2.0
"""The table of peers: what each computes, and that a line of it is enough for every benchmark."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.timing import Effort
from benchmarks.loss import gpu, peers
from benchmarks.loss.cases import LLAVA, MASTER_WEIGHTS, Case, make_tensors, tiny
from benchmarks.loss.checks import WrongResultError, check_slice, full_truth
from benchmarks.loss.cpu import CPU, cpu_case
from benchmarks.loss.measure import run_case
from benchmarks.loss.peers import PEERS, Peer, Where
from benchmarks.loss.work import Floor, Work
from benchmarks.step import models
from prereg_kernels import pre_tap

CASES = (tiny(LLAVA), cpu_case(60, 16, torch.float32), tiny(MASTER_WEIGHTS))
EAGER = [peer for peer in PEERS if not peer.compile_seconds]


def new_loss(
    hidden: Tensor,
    anchor: Tensor,
    weights: Any,
    biases: Any,
    *,
    visual_index: Tensor | None = None,
) -> Tensor:
    """As somebody would write it: cos as a product of normalised rows."""
    h, t = hidden, anchor
    if visual_index is not None:
        h, t = h[visual_index], t[visual_index]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = F.linear(F.gelu(h) if layer else h, weight.to(h.dtype), bias.to(h.dtype))
    h, t = F.normalize(h.float(), dim=1), F.normalize(t.float(), dim=1)
    return -(h * t).sum(1).mean()


NEW = Peer("new", lambda: new_loss)


def imported_again(name: str) -> ModuleType:
    """A copy of a module, beside the one that is there."""
    there = importlib.util.find_spec(name)
    assert there is not None and there.origin is not None
    spec = importlib.util.spec_from_file_location(f"{name}_again", there.origin)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def a_line_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", (*PEERS, NEW))


@pytest.mark.parametrize("peer", [*EAGER, NEW], ids=lambda peer: peer.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_peer_computes_the_loss(case: Case, peer: Peer) -> None:
    """In float64's eyes; without an index too, where it is timed on CPUs."""
    if not case.text and not peer.where & Where.CPU:
        return
    tensors = make_tensors(case, CPU)
    truth = full_truth(case, tensors)
    assert truth is not None
    checked = truth.check(Work(peer, tensors))
    results = ["loss", "dhidden", "dW0", "dW1", "db0", "db1"] if peer.grad else ["loss"]
    assert list(checked["errors"]) == results
    assert max(checked["errors"].values()) < (2e-2 if case.text else 1e-5)
    wrong = replace(peer, make=lambda: lambda *a, **k: off(peer.make()(*a, **k)))
    with pytest.raises(WrongResultError, match="loss: error"):
        truth.check(Work(wrong, tensors))


def off(found: Any) -> Any:
    """A loss that is a tenth too large, with what may stand before it."""
    return (found[0], 1.1 * found[1]) if isinstance(found, tuple) else 1.1 * found


@pytest.mark.parametrize("residual", ("forgotten", "doubled"))
def test_a_tap_adds_the_gradient_of_later_layers_once(residual: str) -> None:
    def wrong(hidden: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        tapped, loss = pre_tap(hidden, *arguments, **options)
        return (tapped.detach().requires_grad_() if residual == "forgotten" else 2 * tapped), loss

    [tap] = [peer for peer in PEERS if peer.residual]
    tensors = make_tensors(CASES[0], CPU)
    truth = full_truth(CASES[0], tensors)
    assert truth is not None
    peer = replace(tap, make=lambda: wrong)
    with pytest.raises(WrongResultError, match="dhidden: error"):
        truth.check(Work(peer, tensors))
    with pytest.raises(WrongResultError, match="dhidden"):
        check_slice(peer, CASES[0], CPU)


def test_the_gradient_of_later_layers_is_as_large_as_the_loss_s() -> None:
    [tap] = [peer for peer in PEERS if peer.residual]
    for case in CASES:
        work = Work(tap, make_tensors(case, CPU))
        later, own = work.upstream[1], work.results()["dhidden"]
        assert later is not None
        assert 0.1 < later.double().norm() / own.norm() < 10


@pytest.mark.usefixtures("a_line_more")
def test_a_line_is_enough_on_a_gpu(tmp_path: Any) -> None:
    options = gpu.parse(["--size", "tiny", "--no-compile", "--out", str(tmp_path / "x.json")])
    benchmark = gpu.LossBenchmark(options)
    for where in (Where.MAIN, Where.SIDE, Where.SWEEP, Where.LINEAR):
        assert benchmark.peers(where)[-1] is NEW
    record: dict[str, Any] = {}
    run_case(benchmark.session, tiny(LLAVA), benchmark.peers(Where.MAIN), Effort(2, 2, 0.0), record)
    assert benchmark.session.problems == []
    assert list(record["variants"])[-1] == "new"
    assert record["variants"]["new"]["ratio_to_floor"] > 0
    assert record["variants"]["new"]["check"]["errors"]["dW0"] < 0.02


@pytest.mark.usefixtures("a_line_more")
def test_a_line_is_enough_in_a_step() -> None:
    variants = imported_again("benchmarks.step.variants")
    hooked = [f"{peer.name}, hook" for peer in peers.PEERS if peer.where & Where.STEP]
    assert "new, hook" in hooked and "eager, hook" in hooked
    assert list(variants.VARIANTS) == [variants.WITHOUT, "naive", *hooked, variants.OURS]
    recipe = models.TINY["llava"]
    model = models.build_model(recipe.config(), CPU)
    batch = models.make_batch(recipe, recipe.config(), 2, CPU)
    errors = variants.check_gradients(model, batch)["new, hook"]
    assert 0 < errors["head"] < 0.05 and 0 < errors["layer"] < 0.1


def test_a_step_goes_on_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("no such package")

    monkeypatch.setattr(peers, "PEERS", (*PEERS, Peer("missing", missing)))
    variants = imported_again("benchmarks.step.variants")
    recipe = models.TINY["llava"]
    model = models.build_model(recipe.config(), CPU)
    batch = models.make_batch(recipe, recipe.config(), 2, CPU)
    errors = variants.check_gradients(model, batch)
    assert errors.keys() == variants.VARIANTS.keys() - {variants.WITHOUT, "missing, hook"}
    assert {"naive", "eager, hook", variants.OURS} <= errors.keys()


def test_ours_run_on_the_backend_that_is_asked_for() -> None:
    found = {peer.name: peer for peer in peers.peers(Where.MAIN, "cpp", compiled=False)}
    assert {name: found[name].backend for name in ("fused", "fused, torch rows", "eager")} == {
        "fused": "cpp", "fused, torch rows": "torch", "eager": None,
    }  # fmt: skip
    assert not any(peer.compile_seconds for peer in found.values())
    assert "compiled eager" in {peer.name for peer in peers.peers(Where.MAIN)}


def test_the_cpu_floor_has_new_results_and_the_same_products() -> None:
    case = CASES[1]
    tensors = make_tensors(case, CPU)
    kept, fresh = Floor(case, tensors), Floor(case, tensors, fresh=True)
    products: list[Tensor] = []

    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if function is torch.mm:
                products.append(result)
            return result

    with Record():
        for floor in (kept, kept, fresh, fresh):
            floor.step()
    assert len(products) == 24
    for before, after in zip(products[:6], products[12:18], strict=True):
        assert torch.equal(before, after)
    places = [x.data_ptr() for x in products]
    assert (len(set(places[:12])), len(set(places[12:]))) == (6, 12)
