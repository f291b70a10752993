# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: a whole tiny experiment, and one-line errors."""

from __future__ import annotations

import json
import re
import statistics
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import TINY, Command, here


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("cli")
    (directory / "tiny.yaml").write_text(TINY)
    run = here("demo", "--preset", "tiny.yaml", "--workers", "1", cwd=directory)
    assert run.returncode == 0, run.stderr
    return directory, run.stdout


def test_experiment_writes_its_report(experiment: tuple[Path, str]) -> None:
    directory, output = experiment
    out = directory / "runs" / "tiny"
    summary = json.loads((out / "summary.json").read_text())
    variants = [(r["seed"], r["variant"]) for r in summary["results"]]
    assert sorted(variants) == [
        (seed, variant) for seed in (0, 1) for variant in ("baseline", "other_scene", "pre")
    ]
    by_variant = {r["variant"]: r for r in summary["results"] if r["seed"] == 0}
    for result in by_variant.values():
        assert {frozen: set(found) for frozen, found in result["transfer"].items()} == {
            "projector": {"3"},
            "nothing": {"3"},
        }
    assert by_variant["pre"]["probe"]["tilt"] != by_variant["baseline"]["probe"]["tilt"]
    assert by_variant["pre"]["probe"]["tilt"] != by_variant["other_scene"]["probe"]["tilt"]
    assert re.search(r"^\d+ steps to train, about (1 minute|(?!1 )\d+ minutes) with", output, re.M)
    page = (out / "report.html").read_text()
    for sentence in summary["headline"]:
        assert sentence.split("±")[0].strip() in page.replace("&#39;", "'")
        assert sentence[:40] in output
    for name in ("probes", "answers", "transfer", "structure", "training", "scenes"):
        for ending in (".png", "-dark.png"):
            assert (out / "plots" / f"{name}{ending}").stat().st_size > 5000
    # light and dark: 5 panels of probes, 8 of structure, 2 of losses, and 3 whole pictures
    assert page.count("data:image/png;base64,") == 2 * 18
    count = 100 * statistics.fmean(r["accuracy"]["count"] for r in by_variant_of(summary, "pre"))
    assert re.search(rf'alt="Right answers\. count: baseline [\d.]+%, PRe {count:.1f}%', page)
    assert (out / "seed-0" / "pre" / "tensorboard").is_dir()
    assert "://" not in re.sub(r"base64,[^\"]+", "", page)  # it needs no network


def by_variant_of(summary: dict[str, Any], variant: str) -> list[dict[str, Any]]:
    return [result for result in summary["results"] if result["variant"] == variant]


def test_run_again_uses_what_is_there(
    experiment: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And starts no process for it."""
    directory, output = experiment
    result = directory / "runs" / "tiny" / "seed-1" / "pre" / "result.json"
    before = result.stat().st_mtime_ns
    monkeypatch.setattr(BaseProcess, "start", lambda _: pytest.fail("a process was started"))
    run = here("demo", "--preset", "tiny.yaml", "--workers", "1", cwd=directory)
    assert run.returncode == 0, run.stderr
    done = re.findall(r"^\[\d/6\] seed .*", output, re.M)
    names = {re.sub(r".*(seed \d, \w+): .*", r"\1", line) for line in done}
    assert names == {f"seed {x}, {y}" for x in (0, 1) for y in ("baseline", "PRe", "control")}
    lines = " ".join(run.stdout.split())  # a narrow terminal breaks them
    for name in names:
        frozen, too = "tower and projector frozen", "the projector trained too"
        learned = rf"[\d.]+% \({frozen}\), [\d.]+% \({too}\)"
        assert re.search(rf"\] {name}: questions [\d.]+%; new ones {learned}", lines)
    summary = json.loads((result.parents[2] / "summary.json").read_text())
    assert re.fullmatch(r"[\d.]+ min, beside what was there before", summary["facts"]["took"])
    assert len(done) == 6 and re.findall(r"^\[\d/6\] seed .*", run.stdout, re.M) == done
    assert result.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["demo", "--preset", "nope"],
            "expected one of scenes, scenes-gpu, scenes-gpu-text, or a YAML file; got nope",
        ),
        (["demo", "--preset", "absent.yaml"], "absent.yaml"),
        (["demo", "--config", "bad.yaml"], "bad.yaml: stepz: unknown key"),
        (["demo", "--config", "bad.yaml", "--seeds", "2"], "--seeds: goes with --preset"),
        (
            ["demo", "--preset", "tiny.yaml", "--weight", "-1"],
            "weight: expected a positive number",
        ),
        (["demo", "--preset", "tiny.yaml", "--weight", "3"], "holds results of other settings"),
        (["demo", "--preset", "tiny.yaml", "--device", "abacus"], "--device: 'abacus' is not"),
        (["demo", "--preset", "tiny.yaml", "--nope"], "unknown flags: --nope; --settings lists"),
        (["doctor", "--nope"], "unrecognized arguments: --nope"),
        (
            ["checkup", "model", "--images", "photos", "--out", "out", "--settings"],
            "unrecognized arguments: --settings",
        ),
        (["demo", "--preset", "tiny.yaml", "--run.pre.weight", "4"], "holds results of other"),
        (
            ["demo", "--preset", "tiny.yaml", "--run.pre.wait", "4"],
            "unknown flags: --run.pre.wait",
        ),
        (
            ["demo", "--config", "run.yaml", "--seed", "-3"],
            "prereg: --seed: expected at least 0, got -3",
        ),
        (
            ["sweep", "--preset", "scenes", "--experiment.seeds", "0"],
            "--experiment.seeds: expected at least 1, got 0",
        ),
        (["nope"], "invalid choice: 'nope'"),
    ],
)
def test_errors_are_one_line(
    experiment: tuple[Path, str], prereg_here: Command, arguments: list[str], message: str
) -> None:
    directory, _ = experiment
    (directory / "bad.yaml").write_text("stepz: 3\n")
    (directory / "run.yaml").write_text("seed: 3\n")
    run = prereg_here(*arguments, cwd=directory)
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stderr.startswith("prereg: ")
    assert run.stderr.count("\n") == 1


def test_alone_it_prints_help(prereg_here: Command, tmp_path: Path) -> None:
    run = prereg_here(cwd=tmp_path)
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout.startswith("usage: prereg")
    assert run.stdout == prereg_here("--help", cwd=tmp_path).stdout
