# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's own code, where there is no GPU: a tiny run, its file, table and sums."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from benchmarks.common.program import Session
from benchmarks.common.report import summarize_variant
from benchmarks.common.timing import CpuClock, Effort
from benchmarks.loss import gpu
from benchmarks.loss.cases import LLAVA, MASTER_WEIGHTS, make_tensors, tiny
from benchmarks.loss.checks import WrongResultError, as_problem, check_slice, full_truth
from benchmarks.loss.kernels import Buffers
from benchmarks.loss.markdown import gpu_markdown
from benchmarks.loss.measure import run_case
from benchmarks.loss.peers import Peer, Where, peers
from benchmarks.loss.report import add_ratios, bars, kernel_lines, short_table
from benchmarks.loss.stages import Stage, time_stages
from benchmarks.loss.work import Floor, Work
from prereg_kernels import eager_pre_loss
from prereg_kernels._util.machine import describe_source
from prereg_kernels.ops.backends.base import Backend, LossChunk
from prereg_kernels.ops.backends.torch import TorchBackend

CPU = torch.device("cpu")
FUSED = peers(Where.LAUNCHES, "torch")[0]


def timed(median: float, **more: Any) -> dict[str, Any]:
    return summarize_variant([median]) | more


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "deeper" / "gpu.json"
    arguments = ["--size", "tiny", "--no-compile", "--out", str(out)]
    assert gpu.main(arguments) == 0
    assert list(out.parent.iterdir()) == [out]
    return json.loads(out.read_text())


def test_file_has_what_it_promises(results: dict[str, Any]) -> None:
    assert results["complete"] is True
    assert results["problems"] == []
    assert {"date", "device", "driver", "torch", "triton", "cuda", "commit", "dirty"} <= (
        results["machine"].keys()
    )
    assert results["ceilings"]["copy_gb_s"] > 0
    assert results["ceilings"]["matmul_tflop_s"] > 0
    names = [case["name"] for case in results["cases"]]
    assert names == [
        "LLaVA", "N=1k", "N=4k", "N=16k", "N=64k", "N=256k",
        "fp32 weights", "small head", "linear head", "Qwen2.5",
    ]  # fmt: skip
    for case in results["cases"]:
        for variant in case["variants"].values():
            assert variant["status"] == "ok"
            assert len(variant["samples_ms"]) == 2
            assert variant["ratio_to_floor"] > 0
    fused = results["cases"][0]["variants"]["fused"]
    assert set(fused["speedups"]) == {"eager"}
    assert set(fused["check"]["errors"]) == {"loss", "dhidden", "dW0", "dW1", "db0", "db1"}
    assert [kernel["name"] for kernel in results["row_kernels"]] == [
        "gather_rows", "activate", "activation_backward", "token_losses",
        "token_losses_and_grad", "start_rows", "scatter_rows", "scatter_rows, residual",
    ]  # fmt: skip
    assert all(kernel["gb_s"] > 0 for kernel in results["row_kernels"])
    assert len(results["launches"]) == 6


def test_tables_print(results: dict[str, Any]) -> None:
    lines = short_table(results).splitlines()
    count = len(results["bars"])
    assert lines[-count - 1].split() == ["performance", "bar", "aim", "measured"]
    for line, found in zip(lines[-count:], results["bars"], strict=True):
        assert line.startswith(found["name"])
        assert line.endswith(("met", "MISSED", "not measured"))
    assert max(map(len, lines)) <= 115
    text = gpu_markdown(results)
    assert text.count("\n| ---") == 3
    assert "Liger" in text


def test_ratios_and_speedups() -> None:
    variants = {
        "floor": timed(2.0),
        "forward floor": timed(1.0),
        "fused": timed(2.2),
        "tap": {"status": "failed", "reason": "no"},
        "forward": timed(1.5),
        "forward, eager": timed(3.0),
        "eager": timed(6.6),
        "eager, index_select": timed(4.4),
        "compiled eager": {"status": "skipped", "reason": "no time left"},
        "Liger's scheme": timed(3.3),
    }
    add_ratios(variants)
    assert variants["fused"]["ratio_to_floor"] == pytest.approx(1.1)
    assert variants["forward"]["ratio_to_floor"] == pytest.approx(1.5)
    assert variants["forward"]["speedups"] == {"eager": pytest.approx(2.0)}
    # against the faster of the two eager ones
    expected = {"eager": pytest.approx(2.0), "Liger's scheme": pytest.approx(1.5)}
    assert variants["fused"]["speedups"] == expected
    assert "speedups" not in variants["tap"]


def test_bars_of_a_run() -> None:
    def case(name: str, tokens: int, **variants: Any) -> dict[str, Any]:
        return {"name": name, "tokens": tokens, "variants": variants}

    def sweep(n: int, milliseconds: float, scratch: int) -> dict[str, Any]:
        return case(f"N={n}k", n * 1024, fused=timed(milliseconds, scratch_bytes=scratch))

    found = bars(
        {
            "cases": [
                case(
                    "LLaVA",
                    18_432,
                    fused=timed(5.0, ratio_to_floor=1.1, speedups={"eager": 1.6, "compile": 1.4}),
                    tap=timed(5.0, ratio_to_floor=1.04, held_bytes=1024),
                ),
                case("LLaVA, autotuned", 18_432, fused=timed(5.0, speedups={"compile": 1.2})),
                sweep(1, 0.12, 10),
                sweep(4, 0.4, 40),
                sweep(16, 1.6, 100),
                sweep(64, 6.4, 100),
                sweep(256, 25.6, 105),
            ]
        }
    )
    measured = {x["name"]: (x["measured"], x["met"], x["aim_met"]) for x in found}
    assert measured["LLaVA, fused: time / floor"] == (1.1, True, False)
    assert measured["LLaVA, tap: time / floor"] == (1.04, True, True)
    assert measured["LLaVA, fused: faster than eager"] == (1.6, True, True)
    # the fastest compiled one counts, whichever case timed it
    assert measured["LLaVA, fused: faster than compile"] == (1.2, True, False)
    assert measured["LLaVA, fused: faster than Liger's scheme"] == (None, None, None)
    assert measured["LLaVA, tap: held between forward and backward"] == (1.0, True, None)
    assert measured["Qwen2.5, fused: time / floor"] == (None, None, None)
    growth, met, _ = measured["fused: time per token over N"]
    assert growth == pytest.approx(1.2)
    assert met is False
    assert measured["fused: scratch over N"] == (1.05, True, None)
    assert measured["tap: scratch over N"] == (None, None, None)


def test_failures_stay_in_their_variant() -> None:
    def broken() -> Any:
        raise ImportError("not installed")

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return 2 * eager_pre_loss(*arguments, **options)

    def crash(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("illegal access")

    session = Session(CpuClock(), time.monotonic() + 600)
    variants = [
        Peer("missing", broken),
        Peer("wrong", lambda: wrong),
        Peer("crash", lambda: crash, ours=True),
        *(peer for peer in peers(Where.CPU) if peer.name == "eager"),
    ]
    record: dict[str, Any] = {}
    run_case(session, tiny(LLAVA), variants, Effort(2, 2, 0.0), record)
    found = {name: variant["status"] for name, variant in record["variants"].items()}
    assert found == {
        "floor": "ok", "missing": "skipped", "wrong": "failed", "crash": "failed", "eager": "ok",
    }  # fmt: skip
    assert "dW0: error" in record["variants"]["wrong"]["reason"]
    assert session.ours_failed
    assert len(session.problems) == 3


def test_floor_does_three_products_a_layer() -> None:
    case = tiny(MASTER_WEIGHTS)
    floor = Floor(case, make_tensors(case, CPU))
    floor.step()
    count = len(case.widths) - 1
    kinds = (floor.outputs, floor.weight_gradients, floor.input_gradients)
    assert [len(kind) for kind in kinds] == [count] * 3
    expected = floor.output_gradients[0].T @ floor.inputs[0]
    assert torch.equal(floor.weight_gradients[0], expected)


def test_slice_check_catches_a_small_error() -> None:
    case = tiny(LLAVA)

    def imprecise(*arguments: Any, **options: Any) -> torch.Tensor:
        return 1.02 * eager_pre_loss(*arguments, **options)

    check_slice(FUSED, case, CPU)
    with pytest.raises(WrongResultError, match="above eager's"):
        check_slice(Peer("imprecise", lambda: imprecise), case, CPU)


def test_full_check() -> None:
    case = tiny(LLAVA)
    tensors = make_tensors(case, CPU)
    truth = full_truth(case, tensors)
    assert truth is not None
    checked = truth.check(Work(FUSED, tensors))
    assert checked["errors"]["dW0"] < 0.02
    # what a case consists of: the loss is far from 0, and the index picks the visual tokens
    assert truth.truth["loss"].item() < -0.5
    assert tensors.visual_index.unique().numel() == case.tokens
    assert tensors.visual_index.max() < case.positions
    assert as_problem(tensors).options["visual_index"] is tensors.visual_index


def test_stages_are_checked_and_compared() -> None:
    class Wrong(TorchBackend):
        def token_losses(self, chunk: LossChunk, spec: Any) -> None:
            super().token_losses(chunk, spec)
            chunk.losses.mul_(1.1)

        def linear_backward_activation(self, *arguments: Any) -> None:
            raise RuntimeError("out of shared memory")

    def kinds(stage: Stage, b: Buffers) -> tuple[dict[str, Backend], str | None]:
        return {"apart": TorchBackend(), "same": TorchBackend(), "wrong": Wrong()}, "same"

    buffers = Buffers(tiny(LLAVA), CPU)
    records = list(time_stages(buffers, kinds, CpuClock(), Effort(2, 2, 0.0)))
    names = [record["name"] for record in records]
    assert names == ["activate", "losses", "backward_activation", "backward_scatter"]
    for record in records:
        assert record["apart_ms"] > 0
        assert record["speedups"]["same"] > 0
        assert record["chosen"] == "same"
    assert [set(record["errors"]) for record in records] == [set(), {"wrong"}, {"wrong"}, set()]
    assert "relative error" in records[1]["errors"]["wrong"]
    assert records[2]["errors"]["wrong"] == "RuntimeError: out of shared memory"
    results = {"stages": records, "row_kernels": [], "launches": []}
    assert len(kernel_lines(results)) == 4


def test_source() -> None:
    assert describe_source("abc-dirty") == {"commit": "abc", "dirty": True}
    assert describe_source("abc") == {"commit": "abc", "dirty": False}
