# SPDX-License-Identifier: Apache-2.0
"""The parts of the two runs, and the programs that are theirs alone, at their tiny size."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import program
from benchmarks.first import __main__ as command
from benchmarks.first import ceilings, chunks, forms, tap_profile
from benchmarks.first.parts import FIRST_SECONDS, SECOND_SECONDS, first, second
from benchmarks.first.tap_profile import Kernel, kernels_of, timeline
from prereg_kernels import fused_pre_loss
from prereg_kernels.ops.backends import registry
from tests.gpu.conftest import FIRST
from tests.helpers import make_problem, run

ROOT = Path(__file__).parents[3]


def test_the_first_run_answers_most_first(tmp_path: Path) -> None:
    parts = first("full", tmp_path)
    assert [part.name for part in parts] == [
        "ceilings", "tests", "profile", "forms", "chunks", "loss", "accuracy", "step llava",
        "more tests",
    ]  # fmt: skip
    assert sum(part.seconds for part in parts) == pytest.approx(FIRST_SECONDS)
    assert FIRST_SECONDS < 560 and SECOND_SECONDS < 200
    kept = [part.kept for part in parts if part.kept]
    assert len({*kept, "first.json", "first.log", "first_trace.json.gz"}) == 8
    for what in ("peers", "qwen"):
        [only] = second("full", what)
        assert only.seconds == SECOND_SECONDS and only.kept


@pytest.mark.parametrize("size", ("full", "tiny"))
def test_every_command_is_understood(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the program's own parser, with the time that it has less than its part."""
    parts = (*first(size, tmp_path), *second(size, "peers"), *second(size, "qwen"))
    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: True)
    seen: list[Any] = []

    def stop(self: Any, options: Any, *others: Any, **more: Any) -> None:
        seen.append(options)
        raise InterruptedError

    monkeypatch.setattr(program.Program, "__init__", stop)
    monkeypatch.setattr(program, "make_clock", lambda device: None)
    for part in parts:
        flag, module, *arguments = part.command(tmp_path / "file", 100.0)
        assert flag == "-m"
        if module == "pytest":
            assert arguments[0] == "tests/gpu" and (ROOT / arguments[0]).is_dir()
            continue
        main = importlib.import_module(module)
        for name in ("make_clock",):
            if hasattr(main, name):
                monkeypatch.setattr(main, name, lambda device: None)
        with pytest.raises(InterruptedError):
            main.main(arguments)
        assert (seen[-1].out, seen[-1].size) == (tmp_path / "file", size)
        assert 80 <= seen[-1].seconds < 100


def test_the_commands_run_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[Any, ...]] = []

    def parts(self: Any, several: Any) -> bool:
        begun.append((self.name, self.out, self.budget, [part.name for part in several]))
        return len(begun) > 1

    monkeypatch.setattr(command.Run, "parts", parts)
    assert command.main(["first", "--out", str(tmp_path)]) == 1
    assert command.main(["second", "--out", str(tmp_path), "--what", "qwen"]) == 0
    assert command.main(["second", "--out", str(tmp_path), "--seconds", "90"]) == 0
    assert [(name, budget, names[0]) for name, _, budget, names in begun] == [
        ("first", FIRST_SECONDS, "ceilings"),
        ("second", SECOND_SECONDS, "step qwen"),
        ("second", 90.0, "compiled peers"),
    ]


def test_tiny_runs(tmp_path: Path) -> None:
    """Each file has what it is for."""

    def stored(module: Any, *more: str) -> dict[str, Any]:
        out = tmp_path / f"{module.__name__}.json"
        assert module.main(["--size", "tiny", "--out", str(out), *more]) == 0
        found: dict[str, Any] = json.loads(out.read_text())
        assert found["complete"] is True and found["problems"] == []
        return found

    found = stored(ceilings)
    assert found["ceilings"]["copy_gb_s"] > 0 and found["ceilings"]["matmul_tflop_s"] > 0
    assert found["unavailable"].keys() == registry.CLASSES.keys()
    found = stored(forms)
    assert found["forms"].keys() == {"128"}
    assert found["forms"]["128"].keys() == {
        "x W^T", "x W^T + b", "d W", "d^T x, bf16", "cast of dW",
    }  # fmt: skip
    for case in stored(chunks)["cases"]:
        ratios = case["of_the_floor"]
        assert ratios.keys() == {"floor", "chunks of None", "chunks of 64", "no residual"}
        assert ratios["floor"] == 1.0 and min(ratios.values()) > 0
    trace = tmp_path / "trace.json.gz"
    found = stored(tap_profile, "--trace", str(trace))
    assert found["taps"] == 5
    # six matmuls a tap, in the stages that have them
    names = {"aten::mm", "aten::addmm", "aten::matmul"} & found["by_name"].keys()
    products = sum(found["by_name"][name]["count"] for name in names)
    assert products == 6 * 5
    assert found["stages"]["prereg::linear_activate"]["count"] == 5
    assert found["stages"]["prereg::add_product"]["count"] == 10
    names = {e.get("name") for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"prereg::pre_gradients", "prereg::token_losses"} <= names
    assert {path.name for path in tmp_path.iterdir() if "partly" in path.name} == set()


def test_timeline() -> None:
    """Gaps are what no kernel fills: those that overlap leave none."""
    found = timeline(
        [
            Kernel("b", 15.0, 20.0), Kernel("a", 0.0, 10.0), Kernel("c", 16.0, 30.0),
            Kernel("a", 33.0, 35.0),
        ]
    )  # fmt: skip
    assert [(k["name"], k["us"], k["gap_us"]) for k in found["kernels"]] == [
        ("a", 10.0, 0.0), ("b", 5.0, 5.0), ("c", 14.0, 0.0), ("a", 2.0, 3.0),
    ]  # fmt: skip
    assert (found["busy_us"], found["gaps_us"]) == (31.0, 8.0)
    assert list(found["by_name"]) == ["c", "a", "b"]
    assert found["by_name"]["a"] == {"count": 2, "mean_us": 6.0, "sum_us": 12.0}
    assert found["largest_gaps"] == [{"before": "b", "us": 5.0}, {"before": "a", "us": 3.0}]
    assert timeline([])["busy_us"] == 0


def test_ranges_are_no_kernels() -> None:
    with (
        profile(activities=[ProfilerActivity.CPU]) as seen,
        record_function(tap_profile.CALL),
    ):
        run(fused_pre_loss, make_problem())
    names = {kernel.name for kernel in kernels_of(seen.events(), on_gpu=False)}
    assert names & {"aten::mm", "aten::addmm", "aten::matmul"}
    assert not any(name.startswith("prereg::") or name == "tap" for name in names)


def test_about_forty_tests_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind; a name that is no test any more would be noticed."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    collected: list[pytest.Item] = []

    class Plugin:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            collected.extend(session.items)

    kept = dict(sys.modules)
    quiet = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*quiet, "-m", "first", str(ROOT / "tests" / "gpu")], plugins=[Plugin()])
    sys.modules.update(kept)
    assert code == 0
    names = [f"{item.path.name}::{item.originalname}" for item in collected]
    assert set(names) == set(FIRST)
    assert 35 <= len(names) <= 45
    both = [i.callspec.params for i in collected if i.originalname == "test_rows_around_a_tile"]
    assert {(str(p["dtype"]), p["backend"]) for p in both} == {
        (f"torch.{d}", b) for d in ("float32", "bfloat16") for b in ("triton", "torch")
    }
