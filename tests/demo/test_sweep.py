# SPDX-License-Identifier: Apache-2.0
"""The sweep: which runs it has, what it makes of them, and that a stopped one goes on."""

from __future__ import annotations

import itertools
import json
import math
import signal
import statistics
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.text import Text

from prereg_kernels.cli.commands import main
from prereg_kernels.demo.config import PReSettings
from prereg_kernels.demo.data.scenes import PROPERTIES
from prereg_kernels.demo.experiment.experiment import ExperimentConfig
from prereg_kernels.demo.experiment.summary import Effect, at, learned, unasked
from prereg_kernels.demo.metrics import read_metrics
from prereg_kernels.demo.sweep.plots import effects, learning_curve, trade
from prereg_kernels.demo.sweep.report import (
    SweepResults,
    answer_columns,
    markdown,
    probe_columns,
    transfer_columns,
)
from prereg_kernels.demo.sweep.sweep import (
    SweepConfig,
    axis_points,
    open_sweep,
    points,
    run_config,
    units,
)
from tests.cli.run import TINY, here, start
from tests.demo.tiny import tiny_run

SWEEP = """
preset: tiny.yaml
seeds: 2
weights: [0.5, 2.0]
layers: [2]
anchors: [other_scene]
long_tail: {count: 1.0, tilt: 0.25}
transfer: true
curve_scenes: [5]
experiment: {transfer: {frozen: [projector]}}
"""
POINTS = ["baseline", "centre", "weight 0.5", "layer 2", "anchor other_scene"]
TAIL = ["long tail, baseline", "long tail, centre"]


def config(**changes: Any) -> SweepConfig:
    return SweepConfig(ExperimentConfig(run=tiny_run(), seeds=2), **changes)


def test_one_thing_at_a_time_and_each_setting_once() -> None:
    sweep = config(
        weights=(5.0, 2.0, 0.5),
        layers=(1, 2),
        anchors=("pre_projector",),
        token_fractions=(0.5, 1.0),
        long_tail={"count": 1.0, "tilt": 0.1},
    )
    centre = tiny_run().pre
    found = {point.name: point for point in points(sweep)}
    assert list(found) == [
        "baseline", "centre", "weight 0.5", "weight 5", "layer 2", "anchor pre_projector",
        "fraction 1", "long tail, baseline", "long tail, centre",
    ]  # fmt: skip
    assert found["weight 5"].pre == replace(centre, weight=5.0)
    assert found["layer 2"].pre == replace(centre, layer=2)
    assert found["anchor pre_projector"].pre == replace(centre, anchor="pre_projector")
    assert found["fraction 1"].pre == replace(centre, token_fraction=1.0)
    assert [p.name for p in axis_points(sweep, "weights").values()] == [
        "weight 0.5", "centre", "weight 5",
    ]  # fmt: skip
    assert list(axis_points(sweep, "anchors")) == ["pre_llm", "pre_projector"]
    todo = units(sweep)
    assert [unit.name for unit in todo[:3]] == [
        "seed 0, baseline", "seed 1, baseline", "seed 0, centre",
    ]  # fmt: skip
    assert len({unit.directory(Path("out")) for unit in todo}) == len(todo) == 18


def test_runs_differ_in_pre_and_seed_alone() -> None:
    sweep = config(weights=(0.5,), long_tail={"count": 1.0, "tilt": 0.1})
    for unit in units(sweep):
        run = run_config(sweep, unit)
        assert run.seed == unit.seed
        without = unit.point.pre is None
        assert [stage.pre for stage in run.stages] == [False, not without]
        tail = unit.point.long_tail
        assert dict(run.families) == ({"count": 1.0, "tilt": 0.1} if tail else tiny_run().families)
        back = {"seed": 0, "pre": tiny_run().pre, "stages": tiny_run().stages}
        assert replace(run, **back, families=tiny_run().families) == tiny_run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0, -1.0)}, r"^weights: weight: expected a positive number, got -1"),
        ({"layers": (3,)}, r"^layers: expected at most 2, the depth, got 3"),
        ({"layers": (0,)}, r"^layers: layer: expected at least 1, got 0"),
        ({"anchors": ("self",)}, r"^anchors: anchor: expected one of .*got 'self'"),
        ({"token_fractions": (1.5,)}, r"^token_fractions: token_fraction: expected .*got 1.5"),
        ({"long_tail": {"weather": 1.0}}, r"^families: unknown \['weather'\]"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def begin(sweep: SweepConfig, out: Path, fresh: bool) -> None:
    with open_sweep(sweep, out, fresh):
        pass


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    begin(config(), tmp_path, False)
    (tmp_path / "seed-0").mkdir()
    more = config(weights=(9.0,), layers=(2,))  # more values and more seeds are no other settings
    begin(replace(more, experiment=replace(more.experiment, seeds=7)), tmp_path, False)
    other = replace(config().experiment, run=tiny_run(pre=PReSettings(layer=2)))
    for changed in (replace(config(), experiment=other), config(transfer=True)):
        with pytest.raises(ValueError, match="holds results of other settings"):
            begin(changed, tmp_path, False)
    begin(replace(config(), experiment=other), tmp_path, True)
    assert not (tmp_path / "seed-0").exists()
    elsewhere = tmp_path / "experiment"
    (elsewhere / "seed-0").mkdir(parents=True)
    with pytest.raises(ValueError, match="seed-0 there was not written by this command"):
        begin(config(), elsewhere, False)


def result(point: str, seed: int, level: float) -> dict[str, Any]:
    """Unasked probes of `level` + 0.1 * layer, and everything else `level`."""
    probe = {name: [level + 0.1 * layer for layer in range(3)] for name in PROPERTIES}
    return {
        "point": point,
        "seed": seed,
        "accuracy": {"count": level},
        "mean_accuracy": level,
        "lm_loss": level,
        "probe": probe,
        "structure": {
            name: [level] * 3
            for name in ("cohesion", "coupling", "centred difference", "centred contrast")
        },
    }


def test_a_setting_is_compared_at_its_own_layer_over_the_seeds_it_shares() -> None:
    base, centre, deep = (0.50, 0.53, 0.51), (0.61, 0.64, 0.60), (0.70, 0.75)
    rows = [result("baseline", seed, level) for seed, level in enumerate(base)]
    rows += [result("centre", seed, level) for seed, level in enumerate(centre)]
    rows += [result("layer 2", seed, level) for seed, level in enumerate(deep)]
    sweep = config(layers=(2,), weights=(7.0,))
    results = SweepResults(sweep, rows)
    assert [point.name for point in results.settings] == ["centre", "layer 2"]  # 7 is not finished
    two = results.settings[1]
    assert results.seeds(two) == 2 and results.layer(two) == 2
    own, last, *_ = probe_columns(results.last)
    effect = results.effect(two, own.measure(results.layer(two)))
    expected = Effect.of([0.70, 0.73], [0.90, 0.95])
    assert effect.difference.value == pytest.approx(expected.difference.value)
    assert effect.difference.half_width == pytest.approx(expected.difference.half_width)
    assert own.measure(1)(rows[0]) == pytest.approx(0.60) and last.heading == "unasked, layer 2"
    assert last.measure(1)(rows[0]) == pytest.approx(0.70)
    stamp = {"device": "CPU", "torch": "2", "commit": "abc", "dirty": False}
    page = markdown(results, [stamp])
    differences = [b - a for a, b in zip(base, centre, strict=True)]
    half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)  # t(0.975, 2)
    cell = f"{100 * statistics.fmean(differences):+.1f} ± {100 * half:.1f} \\*"
    assert f"| centre | 3 | {cell} | {cell} |" in page
    assert "Not run: weight 7. " in page
    # three seeds are too few for any of 24 tests to stay clear
    assert "\\*\\*: still clear after Holm's correction for all of them (0)" in page
    assert "| baseline | 3 | 51.3 | 51.3 | 0.513 |" in page
    assert "commit abc." in page


def test_the_curve_and_the_trade_show_every_setting() -> None:
    weights = (0.5, 1.0, 5.0, 7.0)
    names = ["centre", *(f"weight {weight:g}" for weight in weights)]
    sweep = config(weights=weights, transfer=True, curve_scenes=(8, 512), curve_settings=names)
    rows = []
    for place, name in enumerate(["baseline", *names]):
        for seed in (0, 1):
            level = 0.1 + 0.1 * place + 0.02 * seed
            answers = {"tilt": {"accuracy": level, "majority": 0.25}}
            kinds = {"projector": {n: answers for n in ("8", "64", "512")}}
            kinds["nothing"] = {"64": answers}
            rows.append({**result(name, seed, level), "transfer": kinds})
    results = SweepResults(sweep, rows)
    [axis] = learning_curve(results).axes
    drawn = [container[0].get_ydata().tolist() for container in axis.containers]
    assert drawn == [pytest.approx([11 + 10 * place] * 3) for place in range(6)]
    assert axis.containers[0][0].get_xdata().tolist() == [8, 64, 512]
    [axis] = trade(results).axes
    ends = [[line.get_xdata()[0], line.get_ydata()[0]] for line in axis.lines[2:]]
    assert ends[:5] == [pytest.approx([10 * place, 10 * place]) for place in range(1, 6)]
    plt.close("all")


def test_names_of_close_settings_are_apart_and_lines_have_their_own() -> None:
    weights = (0.5, 1.0, 5.0, 7.0)
    names = ["centre", *(f"weight {weight:g}" for weight in weights)]
    sweep = config(weights=weights, transfer=True)
    rows = []
    for name in ["baseline", *names]:
        for seed in (0, 1):
            level = 0.1 + 0.5 * (name != "baseline") + 0.02 * seed
            answers = {"64": {"tilt": {"accuracy": level, "majority": 0.25}}}
            kinds = {"projector": answers, "nothing": answers}
            rows.append({**result(name, seed, level), "transfer": kinds})
    results = SweepResults(sweep, rows)
    [axis] = trade(results).axes
    axis.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without their lines
    assert len(boxes) == len(names) and len({text.get_text() for text in axis.texts}) == len(names)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    *_, probes, _, learned_after = effects(results, "weights", axis_points(sweep, "weights")).axes
    legend = learned_after.get_legend()
    assert legend is not None and probes.get_legend() is None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [column.heading for column in transfer_columns(sweep)]
    plt.close("all")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("sweep")
    (directory / "tiny.yaml").write_text(TINY)
    (directory / "sweep.yaml").write_text(SWEEP)
    run = here("sweep", "--preset", "sweep.yaml", "--workers", "1", cwd=directory)
    assert run.returncode == 0, run.stderr
    return directory, run.stdout


def test_it_writes_what_it_found(swept: tuple[Path, str]) -> None:
    directory, output = swept
    out = directory / "runs" / "sweep-sweep"
    stored = json.loads((out / "results.json").read_text())
    assert [(r["point"], r["seed"]) for r in stored["runs"]] == [
        (name, seed) for name in POINTS + TAIL for seed in (0, 1)
    ]
    assert stored["stamp"].keys() >= {"commit", "dirty", "device", "torch", "date"}
    assert all(run["stamp"]["torch"] == stored["stamp"]["torch"] for run in stored["runs"])
    by_point: dict[str, list[dict[str, Any]]] = {}
    for run in stored["runs"]:
        by_point.setdefault(run["point"], []).append(run)
    assert set(by_point["long tail, centre"][0]["accuracy"]) == {
        "count", "read", "presence", "comparison", "tilt",
    }  # fmt: skip
    for run in stored["runs"]:
        if run["point"] in TAIL:  # whose questions are no new ones
            assert "transfer" not in run
            continue
        curve = run["point"] in ("baseline", "centre")
        assert set(run["transfer"]) == {"projector"}
        assert set(run["transfer"]["projector"]) == ({"3", "5"} if curve else {"3"})
    gain = Effect.of(*([learned("projector", 5)(r) for r in by_point[p]] for p in POINTS[:2]))
    norms = [by_point[name][0]["states"]["norm"][-1] for name in POINTS]
    assert len(set(norms)) == len(POINTS)  # they are other models

    page = (out / "tables.md").read_text()
    for name, get, columns, column in (
        ("weight 0.5", at("lm_loss"), answer_columns(["count", "read"]), -1),
        ("layer 2", unasked(2), probe_columns(6), 0),
    ):
        effect = Effect.of(*([get(run) for run in by_point[p]] for p in ("baseline", name)))
        shown = columns[column]
        text = f"{shown.scale * effect.difference.value:+{shown.digits}} ± "
        row = [line for line in page.splitlines() if line.startswith(f"| {name} | 2 |")]
        assert any(text in line for line in row), (text, row)
    assert "**Answers after a long-tailed mix (%)**" in output
    assert f" {100 * gain.difference.value:+.1f} ± " in page.partition("| 3 scenes | 5 scenes |")[2]
    for axis in ("weights", "layers", "anchors", "curve", "trade"):
        assert (out / "plots" / f"{axis}.png").stat().st_size > 5000
    assert not (out / "plots" / "token_fractions.png").exists()
    assert not list(out.glob("seed-*/**/checkpoints"))


def test_only_the_baseline_trains_without_pre(swept: tuple[Path, str]) -> None:
    out = swept[0] / "runs" / "sweep-sweep" / "seed-1"
    lines = {path.name: read_metrics(path) for path in out.iterdir()}
    assert len(lines) == 7
    for name, rows in lines.items():
        assert ["pre_loss" in row for row in rows] == [False] + 3 * ["baseline" not in name]
    first = {name: rows[1]["lm_loss"] for name, rows in lines.items()}
    for name, value in first.items():  # same data, same weights
        assert value == first["long-tail-baseline" if "tail" in name else "baseline"], name


def _stripped(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    return {k: v for k, v in found.items() if k not in ("stamp", "train_step_seconds")}


def _finished(out: Path) -> dict[str, Path]:
    return {str(p.relative_to(out)): p for p in out.glob("seed-*/*/result.json")}


def test_stopped_and_run_again_it_ends_where_an_unbroken_one_does(
    swept: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = swept
    unbroken = directory / "runs" / "sweep-sweep"
    arguments = ["sweep", "--preset", "sweep.yaml", "--workers", "1", "--out", "stopped"]
    arguments += ["--seeds", "1"]
    process = start(*arguments, cwd=directory)
    out = directory / "stopped"
    end = time.monotonic() + 120
    while len(_finished(out)) < 3 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "prereg: stopped; what was trained is in stopped; run again to resume\n"
    before = {name: path.stat().st_mtime_ns for name, path in _finished(out).items()}
    assert 3 <= len(before) < 7
    report = here(*arguments, "--report", cwd=directory)
    assert report.returncode == 0, report.stderr
    assert len(_finished(out)) == len(before)
    run = here(*arguments, cwd=directory)
    assert run.returncode == 0, run.stderr
    monkeypatch.setattr(BaseProcess, "start", lambda _: pytest.fail("a process was started"))
    assert here(*arguments, cwd=directory).stdout.count("seed 0, ") >= 7  # read, not run again
    after = _finished(out)
    first = {name for name in _finished(unbroken) if name.startswith("seed-0/")}
    assert after.keys() == first and len(after) == 7
    assert all(after[name].stat().st_mtime_ns == time_ns for name, time_ns in before.items())
    for name, path in after.items():
        assert _stripped(path) == _stripped(unbroken / name), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --preset"),
        (["--preset", "nope"], "--preset: expected one of scenes, scenes-gpu, or a YAML file"),
        (
            ["--preset", "tiny.yaml"],
            "tiny.yaml: preset: expected a preset's name or a YAML file, got None",
        ),
        (["--preset", "typo.yaml"], "typo.yaml: weight: unknown key"),
        (["--preset", "sweep.yaml", "--steps", "9"], "holds results of other settings"),
        (["--preset", "sweep.yaml", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (["--preset", "sweep.yaml", "--device", "abacus"], "--device: 'abacus' is not usable here"),
        (["--preset", "sweep.yaml", "--out", "none", "--report"], "no setting and its baseline"),
    ],
)
def test_errors_are_one_line(
    swept: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    directory, _ = swept
    (directory / "typo.yaml").write_text("preset: tiny.yaml\nweight: [1.0]\n")
    monkeypatch.chdir(directory)
    monkeypatch.setattr("sys.argv", ["prereg", "sweep", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in errors
    assert errors.startswith("prereg: ") and errors.count("\n") == 1
