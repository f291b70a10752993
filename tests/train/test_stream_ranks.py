# SPDX-License-Identifier: Apache-2.0
"""Two ranks on a stream, and on packed rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.launching import start, torchrun
from tests.train.places import make_place, metrics, settings, write
from tests.train.test_packing import packed_settings, run_packed

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def test_two_ranks_read_a_stream(place: Path, tmp_path: Path) -> None:
    """Of uneven shards, one of them of text alone: none waits for the other, and all rows come."""
    records = json.loads((place / "data.json").read_text())
    text = [record for record in records if not record["image"]]
    (tmp_path / "shards").mkdir()
    for name, several in (("a", text), ("b", [r for r in records if r["image"]])):
        lines = "\n".join(map(json.dumps, several))
        (tmp_path / "shards" / f"{name}.jsonl").write_text(lines + "\n{bad\n")
    out = tmp_path / "out"
    path = write(tmp_path / "c.yaml", settings(
        place, out, data__0__path=str(tmp_path / "shards"), data__0__streaming=True,
        stages__1__max_steps=8, trainer__per_device_train_batch_size=2, max_bad=20,
    ))  # fmt: skip
    done = start(*torchrun(2), "train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(metrics(out, "tune")) == 8
    lines = (out / "bad_samples.jsonl").read_text().splitlines()
    names = {Path(json.loads(line)["where"]).name for line in lines}
    assert names == {"a.jsonl:7", "b.jsonl:19"}
    for stage in ("align", "tune"):
        for rank in range(2):
            [*_, last] = sorted((out / "stages" / stage).glob("checkpoint-*"))
            assert json.loads((last / f"stream_{rank}.json").read_text())["ranks"] == 2


def test_two_ranks_pack_as_one(place: Path, tmp_path: Path) -> None:
    """The rows of a step are the same, and so are its losses and gradients."""
    one, two = run_packed(place, tmp_path / "one", 2), tmp_path / "two"
    path = write(tmp_path / "two.yaml", packed_settings(place, two, 1))
    done = start(*torchrun(2), "train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for a, b in zip(metrics(one, "tune"), metrics(two, "tune"), strict=True):
        for name in ("lm_loss", "pre_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
