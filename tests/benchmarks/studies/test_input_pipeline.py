# SPDX-License-Identifier: Apache-2.0
"""The study of the input pipeline, on few samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies import input_pipeline


def test_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ALONE": 16, "IMAGES": 4, "STEPS": 2, "WORKERS": 1}.items():
        monkeypatch.setattr(input_pipeline, name, value)
    found = input_pipeline.measure(tmp_path, 320)
    assert found["samples"] == 320 and len(found["memory_bytes"]) == 10
    assert found["read_per_second"] > 0 and found["trained_per_second"] > 0
    assert min(found["memory_bytes"]) > 1e8
