# SPDX-License-Identifier: Apache-2.0
"""The study of large JSON files, on a small one."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.studies.many_samples import measure, write_file


def test_measures(tmp_path: Path) -> None:
    found = measure(tmp_path, samples=50, read=20)
    assert found["samples"] == 50 and found["read"] == 20
    assert found["open_seconds"] > 0 and found["read_seconds"] > 0
    write_file(tmp_path / "again.json", 50)
    assert found["file_bytes"] == (tmp_path / "again.json").stat().st_size
    records = json.loads((tmp_path / "again.json").read_text())
    assert [record["image"] for record in records] == [f"coco/{i}.jpg" for i in range(50)]
