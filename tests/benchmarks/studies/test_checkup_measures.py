# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the measures runs, and its values are those of its features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import checkup_measures
from prereg_kernels.checkup import patch_structure, similarity


def test_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup_measures, "LENS_ROWS", 10)
    monkeypatch.setattr(checkup_measures, "PROBE_ROWS", 200)
    threads = torch.get_num_threads()
    path = tmp_path / "measures.json"
    checkup_measures.main(
        ["--images", "9", "--columns", "16", "--threads", str(threads), "--output", str(path)]
    )
    found = json.loads(path.read_text())
    assert found["rows"] == 9 * 576
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()), abs=0.1)
    assert found["peak_memory_bytes"] >= found["peak_memory_before_bytes"] > 0
    assert set(found["machine"]) >= {"device", "torch", "commit", "threads"}

    batches = list(checkup_measures.batches(9, 16))
    x, reference = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    owners = torch.cat([b.objects for b in batches])
    images = torch.cat([b.images + 100 * i for i, b in enumerate(batches)])
    structure = patch_structure(x, owners, images)._asdict()
    assert found["values"]["PatchStructure"] == pytest.approx(structure, rel=1e-6)
    similar = similarity(x, reference)._asdict()
    assert found["values"]["Similarity"] == pytest.approx(similar, rel=1e-6)
