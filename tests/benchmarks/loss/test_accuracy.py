# SPDX-License-Identifier: Apache-2.0
"""The accuracy benchmark's own code, where there is no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.loss import accuracy
from benchmarks.loss.accuracy import judge, measure, truth_in_slices
from benchmarks.loss.cases import LLAVA, make_tensors, tiny
from benchmarks.loss.checks import as_problem
from tests.helpers import relative_error, run_truth

CPU = torch.device("cpu")
RESULTS = {"loss", "dhidden", "dW0", "dW1", "db0", "db1"}


@pytest.mark.parametrize("rows", (1000, 50))
def test_truth_in_slices_is_the_truth(rows: int) -> None:
    case = replace(tiny(LLAVA), dtype=torch.float32, weight_dtype=torch.float32)
    problem = as_problem(make_tensors(case, CPU))
    sliced, whole = truth_in_slices(problem, 3.0, rows), run_truth(problem, 3.0)
    assert sliced.keys() == whole.keys() == RESULTS
    for name, true in whole.items():
        assert relative_error(sliced[name], true) < 1e-13, name


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "accuracy.json"
    assert accuracy.main(["--out", str(out), "--size", "tiny"]) == 0
    results = json.loads(out.read_text())
    assert results["complete"] is True
    assert results["problems"] == []
    assert [case["dtype"] for case in results["cases"]] == ["bfloat16", "float16"]
    for case in results["cases"]:
        assert case["results"].keys() == {"fused", "tap"}
        for judged in case["results"].values():
            assert judged.keys() == RESULTS
            assert all(found["met"] for found in judged.values())
            # the gradients are those of the dtype: neither underflown nor exact
            assert 1e-5 < judged["dW0"]["error"] < 2e-2
            assert 1e-5 < judged["dW0"]["eager"] < 2e-2
    assert capsys.readouterr().out.count(" met") == 24


def test_an_excess_is_a_miss() -> None:
    errors = measure(tiny(LLAVA), 1.0, CPU, draws=3, rows=64)
    assert all(found["met"] for found in judge(errors)["fused"].values())
    errors["fused"]["dW1"] = [1.05 * error for error in errors["eager"]["dW1"]]
    found = judge(errors)["fused"]["dW1"]
    assert found["met"] is False
    assert found["ratio"] == pytest.approx(1.05)
    assert "above eager's" in found["broken"]
