# SPDX-License-Identifier: Apache-2.0
"""The suites of `pytest benchmarks --benchmark-only`: what is run, set up, refused and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common.report import Json
from benchmarks.loss import checks, cpu_memory, peers, work
from benchmarks.loss.checks import WrongResultError, is_emulated
from benchmarks.loss.cpu import cpu_case
from benchmarks.loss.cpu_table import format_tables
from benchmarks.loss.peers import PEERS, Peer
from prereg_kernels import eager_pre_loss

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SUITES = ("calls", "memory", "primitives", "times")


@dataclass
class Seen:
    """What a run of pytest did."""

    code: int = -1
    collected: list[str] = field(default_factory=list)
    deselected: list[str] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    results: Json = field(default_factory=dict)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += [item.nodeid for item in items]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.reports[report.nodeid.partition("[")[2][:-1]] = report


Run = Callable[..., Seen]


@pytest.fixture
def run_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """pytest within this process, on benchmarks/ with these arguments."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # with which there are no benchmarks
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> Seen:
        for name in [name for name in sys.modules if name.startswith("benchmarks.")]:
            if name.rpartition(".")[2].startswith("test_") or name.endswith(("suite", "plans")):
                monkeypatch.delitem(sys.modules, name)
        seen, out = Seen(), tmp_path / "results.json"
        out.unlink(missing_ok=True)
        fixed = ["--benchmark-only", "-s", "-p", "no:xdist", "-p", "no:cacheprovider"]
        fixed += [f"--benchmark-json={out}", f"--benchmark-storage={tmp_path}"]
        capsys.readouterr()
        seen.code = pytest.main([*fixed, *arguments], plugins=[seen])
        seen.text = capsys.readouterr().out
        if out.is_file() and out.stat().st_size:
            seen.results = json.loads(out.read_text())
        return seen

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_a_cpu_can_run_is_collected(run_suites: Run) -> None:
    seen = run_suites("benchmarks", "--collect-only")
    assert seen.code == 0
    for suite in SUITES:
        assert any(f"loss/test_{suite}.py" in name for name in seen.collected), suite
    assert not any("gpu" in name or "LLaVA" in name for name in seen.collected)
    assert any("test_step.py" in name for name in seen.deselected)
    line = f"deselected: {len(seen.deselected)} benchmarks of a GPU, as none is here"
    assert line in seen.text.splitlines()
    tiny = run_suites("benchmarks", "--collect-only", "--size", "tiny")
    assert sorted(tiny.collected) == sorted(seen.collected + seen.deselected)


def wrong(*arguments: Any, **options: Any) -> Tensor:
    """The right value with wrong gradients."""
    loss = eager_pre_loss(*arguments, **options)
    return loss.detach() + 1.5 * (loss - loss.detach())


def test_a_wrong_peer_fails_and_what_is_deselected_is_not_set_up(
    run_suites: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a deselected peer of the case, nor another case."""
    more = (Peer("right", lambda: eager_pre_loss), Peer("wrong", lambda: wrong))
    monkeypatch.setattr(peers, "PEERS", (*PEERS, *more))
    set_up: list[tuple[str, Any]] = []
    begin = work.Work.__init__

    def watched(self: Any, peer: Peer, tensors: Any) -> None:
        set_up.append((peer.name, tensors.hidden.dtype))
        begin(self, peer, tensors)

    monkeypatch.setattr(work.Work, "__init__", watched)
    selected = "512 and float32 and (floor or right or wrong or tap) and not residual"
    seen = run_suites("benchmarks/loss/test_times.py", "--size", "tiny", "-k", selected)
    assert seen.code == 1
    case = "N=8192 D=512 float32-"
    outcomes = {name.removeprefix(case): r.outcome for name, r in seen.reports.items()}
    assert outcomes == {"floor": "passed", "right": "passed", "wrong": "failed", "tap": "passed"}
    message = seen.reports[f"{case}wrong"].longreprtext
    assert "wrong: WrongResultError" in message and "dW0: error" in message
    assert set(set_up) == {(name, torch.float32) for name in ("right", "wrong", "tap")}

    found = {b["extra_info"]["implementation"]: b for b in seen.results["benchmarks"]}
    assert found.keys() == {"floor", "right", "tap"}
    assert {b["group"] for b in found.values()} == {"N=8192 D=512 float32"}
    medians = {name: b["stats"]["median"] for name, b in found.items()}
    for name, benchmark in found.items():
        ratio = benchmark["extra_info"]["ratio_to_floor"]
        assert ratio == pytest.approx(medians[name] / medians["floor"], rel=1e-3)
    assert set(found["tap"]["extra_info"]["check"]["errors"]) == {
        "loss", "dhidden", "dW0", "dW1", "db0", "db1",
    }  # fmt: skip


def test_emulated_products_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """There eager's errors are those of a few rows, and the check is as sharp."""
    case = cpu_case(300, 32, torch.bfloat16)
    tensors = checks.make_tensors(case, CPU)
    monkeypatch.setattr(checks, "operand_dtype", lambda dtype, device: torch.float32)
    assert is_emulated(torch.bfloat16, CPU)
    rows: list[int] = []

    def eager(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
        rows.append(hidden.shape[0])
        return eager_pre_loss(hidden, *arguments, **options)

    monkeypatch.setattr(checks, "eager_pre_loss", eager)
    truth = checks.full_truth(case, tensors)
    assert truth is not None and rows == [checks.FEW_ROWS]
    [fused] = [peer for peer in PEERS if peer.name == "fused"]
    truth.check(work.Work(fused, tensors))
    with pytest.raises(WrongResultError, match="dW0: error"):
        truth.check(work.Work(Peer("wrong", lambda: wrong), tensors))


def test_bytes_compare(run_suites: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak that grows by a fifth is a regression, in MiB; one that stays is none."""
    gradient = 512 * 16 * 4  # of hidden, at the tiny size
    peak = 100 * 2**20
    monkeypatch.setattr(cpu_memory, "peak_bytes", lambda peer, case: peak + gradient)
    only = ["benchmarks/loss/test_memory.py", "--size", "tiny", "-k", "test_memory and fused"]
    first = run_suites(*only, "--benchmark-save=before")
    assert first.code == 0
    compare = [*only, "--benchmark-compare=0001", "--benchmark-compare-fail=median:5%"]
    assert run_suites(*compare).code == 0
    peak = 120 * 2**20
    with pytest.raises(Exception, match="regressed"):
        run_suites(*compare)
    found = {b["extra_info"]["implementation"]: b for b in first.results["benchmarks"]}
    assert found.keys() == {"fused", "fused, recompute"}
    for benchmark in found.values():
        assert benchmark["stats"]["median"] == benchmark["extra_info"]["peak_bytes"] == 100 * 2**20
    assert "time in MiB instead of seconds" in first.text
    assert "100.0000" in first.text


def test_calls_and_primitives(run_suites: Run) -> None:
    """At their tiny size: the shapes they are grouped by, and the bytes of a primitive."""
    selected = "(test_call and 1-eager and not 1024) or (cache and bfloat16 and gather_rows)"
    seen = run_suites("benchmarks/loss", "--size", "tiny", "-k", selected)
    assert seen.code == 0
    groups = {b["group"]: b for b in seen.results["benchmarks"]}
    assert groups.keys() == {"call, 1 rows of 64, cpu", "primitives, 16 x 16 bfloat16"}
    primitive = groups["primitives, 16 x 16 bfloat16"]
    assert primitive["extra_info"]["bytes"] == 2 * 2 * 16 * 16
    rate = primitive["extra_info"]["bytes"] / primitive["stats"]["median"] / 1e9
    assert primitive["extra_info"]["gb_s"] == pytest.approx(rate)
    for benchmark in groups.values():  # thousands are left out of the file
        assert ("data" in benchmark["stats"]) == (benchmark["stats"]["rounds"] <= 200)


@pytest.mark.parametrize("name", ("cpu.json", "cpu_avx512.json", "cpu_epyc.json"))
def test_readme_s_tables(name: str) -> None:
    """The stored run has what the tables are made of, beside calls and primitives or not."""
    stored = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    text = format_tables(stored["benchmarks"])
    assert "| time / floor" in text and "| peak memory" in text
    assert "Times: forward and backward, N=8192, 2 threads" in text
    assert "Memory: N=65536 D=512 float32, one thread" in text
