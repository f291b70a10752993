# SPDX-License-Identifier: Apache-2.0
"""Write README's and docs' figures from benchmarks/results/, between their markers.

    python -m benchmarks.readme --keep-demo runs/scenes           # first: keep a demo's summary
    python -m benchmarks.readme --keep-sweep runs/sweep-scenes    # first: keep a sweep's results

Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from benchmarks.loss.cpu_table import format_tables
from benchmarks.studies import adapters, claims, deepstack, depth, merging, photographs, tuning
from benchmarks.studies.demo_run import keep_sweep
from benchmarks.studies.merging import MEASURES
from benchmarks.studies.photo_scenes import MEANS
from benchmarks.studies.token_fraction import format_table
from prereg_kernels._util.files import read_json
from prereg_kernels._util.settings_file import from_dict
from prereg_kernels.checkup.report.pictures import Drawing, draw_all
from prereg_kernels.checkup.words import plus_minus
from prereg_kernels.cli.demo import load_sweep
from prereg_kernels.demo.config import TRAINED
from prereg_kernels.demo.experiment import plots
from prereg_kernels.demo.experiment.summary import Effect, Results, at, learned, unasked
from prereg_kernels.demo.sweep.plots import plot_sweep
from prereg_kernels.demo.sweep.report import SweepResults, markdown
from prereg_kernels.demo.sweep.sweep import (
    BASELINE,
    CENTRE,
    SweepConfig,
    check_sweep,
    finished,
    points,
    stamps,
)

ROOT = Path.cwd()  # the top of a checkout, where `python -m benchmarks.readme` runs
RESULTS = ROOT / "benchmarks" / "results"
FEW_SHOT = RESULTS / "few_shot"
CPU_RUN = RESULTS / "cpu_avx512.json"  # of `make bench`
OLDER_CPU_RUNS = (RESULTS / "cpu_epyc.json", RESULTS / "cpu.json")  # machines that are gone
NOT_RUN = "Not run yet."
# {setting of the demo's sweep: its column of docs/pays.md}
PAYS = {
    BASELINE: "",
    CENTRE: "weight 0.5",
    "weight 5": "weight 5",
    "anchor pre_llm": "weight 0.5, the default anchor",
    "anchor other_scene_pre_projector": "another scene's target",
}


def keep_demo(directory: Path, commit: str) -> None:
    """Copy a demo's summary into results/, with the commit it was made at and the machine."""
    summary = json.loads((directory / "summary.json").read_text())
    stamp = {"commit": commit, "processor": platform.processor() or platform.machine()}
    text = json.dumps({"stamp": stamp, **summary}, indent=1)
    (RESULTS / "demo.json").write_text(text + "\n")


def cost_sentence() -> str:
    """What PRe costs, from the demo's training step and the benchmark of the loss."""
    cost = json.loads((RESULTS / "demo.json").read_text())["cost"]
    before, after = (cost["peak_bytes"][name] / 2**20 for name in ("baseline", "pre"))
    memory = f"{after - before:.0f} MiB more memory"
    if abs(after - before) < 0.02 * before:  # which runs of one model differ by
        memory = f"about as much memory ({after - before:+.0f} of {before:.0f} MiB)"
    benchmarks = json.loads(CPU_RUN.read_text())["benchmarks"]
    found = [benchmark["extra_info"] for benchmark in benchmarks]
    taps = [x for x in found if x.get("implementation") == "tap" and "ratio_to_floor" in x]
    ratios = [
        [x["ratio_to_floor"] for x in taps if x["size"].endswith(dtype)]
        for dtype in ("float32", "bfloat16")
    ]
    ranges = [f"{min(of_dtype):.2f} to {max(of_dtype):.2f}" for of_dtype in ratios]
    peaks = {x["implementation"]: x["peak_bytes"] for x in found if "peak_bytes" in x}
    return (
        f"On a CPU, PRe makes a training step of the demo's small LLaVA "
        f"{100 * (cost['step_ratio'] - 1):.1f}% longer (standard error "
        f"{100 * cost['step_ratio_error']:.1f}%), and takes {memory}. The loss has six matrix "
        f"products. Loss and gradients together take {ranges[0]} times as long as the products "
        f"alone in float32, and {ranges[1]} times in bfloat16. For the loss, eager PyTorch takes "
        f"{peaks['eager'] / peaks['tap']:.0f} times the memory of the package "
        f"({found[0]['device']}, commit {found[0]['commit']})."
    )


def _few_shot() -> SweepResults:
    """The demo's sweep, as far as it was run."""
    config = load_sweep("scenes")
    asked = read_json(FEW_SHOT / "sweep.json")
    experiment = replace(config.experiment, seeds=asked["seeds"])  # some settings have more
    config = replace(config, experiment=experiment)
    check_sweep(config, FEW_SHOT)
    return SweepResults(config, finished(config, FEW_SHOT))


def gain_sentence() -> str:
    """What PRe gives, in words: the centre of the demo's sweep."""
    results = _few_shot()
    by_name = {point.name: point for point in points(results.config)}
    centre, default = by_name[CENTRE], by_name["anchor pre_llm"]
    test = results.config.experiment.transfer
    effect, of_default = (
        results.effect(point, learned("projector", test.scenes)) for point in (centre, default)
    )
    before, after = (f"{100 * x.value:.1f}%" for x in (effect.before, effect.after))
    common = results.effect(centre, at("mean_accuracy")).difference
    unclear = "" if effect.difference.direction else ", which is not clear"
    commits = sorted({stamp["commit"] for stamp in stamps(finished(results.config, FEW_SHOT))})
    return (
        f"A small LLaVA that was trained with PRe later answers {after} of new kinds of question "
        f"right, and one that was trained without {before}. That is "
        f"{plus_minus(effect.difference, 100, '.1f')} points{unclear} (half the 95% interval over "
        f"{results.seeds(centre)} paired seeds). Each of the {len(test.families)} kinds is learned "
        f"from {test.scenes} scenes with {test.questions_per_scene} questions, with tower and "
        "projector frozen and PRe off. On the training's own questions the difference is "
        f"{plus_minus(common, 100, '.1f')} points. PRe's head predicts the vision encoder's "
        f"output, the anchor `{centre.pre.anchor}`. With the default anchor, `pre_llm`, new kinds "
        f"of question gain {plus_minus(of_default.difference, 100, '.1f')} points "
        f"({results.seeds(default)} seeds; commit {', '.join(commits)})."
    )


def claim_section() -> str:
    """README's table: what `make demo` shows."""
    demo = json.loads((RESULTS / "demo.json").read_text())
    results, config = Results(demo["results"]), demo["config"]
    layer = config["run"]["pre"]["layer"]
    rows = {
        f"new questions from {scenes} scenes, {TRAINED[frozen]}": learned(frozen, scenes)
        for frozen, scenes in results.transfers
    }
    rows["the training's own questions"] = at("mean_accuracy")
    rows[f"properties that no question asks about, by linear probes at layer {layer}"] = unasked(
        layer
    )
    lines = [
        "| | baseline (% right) | PRe (% right) | PRe − baseline (points) "
        "| control − baseline (points) |"
    ]
    lines.append("|---|---|---|---|---|")
    for label, get in rows.items():
        effect, other = results.effect(get), results.effect(get, after="other_scene")
        levels = (f"{100 * x.value:.1f}" for x in (effect.before, effect.after))
        differences = (plus_minus(x.difference, 100, ".1f") for x in (effect, other))
        lines.append(f"| {label} | {' | '.join([*levels, *differences])} |")
    families = " and ".join(results.new_families)
    return "\n".join(
        [
            *lines,
            "",
            "`make demo` prints all of these figures but the last column, in several tables. They "
            "are means over "
            f"{len(results.seeds)} paired seeds, which share data and initial weights. After ± is "
            "half the 95% t interval. PRe here: "
            f"{demo['facts']['PRe']}. The new "
            f"questions are about {families}. Each kind is learned alone, with PRe off.",
        ]
    )


def _draw_demo(demo: dict[str, Any]) -> None:
    """The demo's pictures, into docs/images/."""
    results, layer = Results(demo["results"]), demo["config"]["run"]["pre"]["layer"]

    def draw(colours: plots.Colours) -> Iterator[tuple[str, Drawing]]:
        yield "probes", plots.probes(results, layer, colours)
        yield "new-questions", plots.transfer(results, colours)

    with tempfile.TemporaryDirectory() as directory:
        for name in draw_all(draw, Path(directory)):
            shutil.copy(Path(directory) / f"{name}.png", ROOT / "docs" / "images")


def demo_section() -> str:
    """The demo's sentences and its main rows; its pictures, into docs/images/."""
    demo = json.loads((RESULTS / "demo.json").read_text())
    _draw_demo(demo)
    tables = {table["title"]: table for table in demo["tables"]}
    probes = tables["Linear probes at the visual tokens (%)"]
    answers = tables["Answers (%)"]
    [transfer] = [table for title, table in tables.items() if title.startswith("Transfer")]
    wanted = ("digit", "mean of the unasked")
    kept = [row for row in probes["rows"] if any(name in row[0] for name in wanted)]
    rows = [[f"probe, {row[0]}", *row[1:]] for row in kept]
    rows += [[f"answers, {row[0]}", *row[1:]] for row in answers["rows"] if row[0] == "mean"]
    rows += [[f"new questions, {row[0]}", *row[1:]] for row in transfer["rows"]]
    facts, stamp = demo["facts"], demo["stamp"]
    lines = [f"- {sentence}" for sentence in demo["headline"]]
    lines += ["", "| % | baseline | PRe | control | PRe − baseline |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    cost = tables["Cost on this machine, one thread"]["rows"]
    lines += [
        "",
        f"{facts['seeds']} paired seeds, {facts['steps']} steps; after ± the deviation over seeds, "
        "for differences half the 95% t interval, * where it excludes 0. "
        + " ".join(f"{row[0]}: {row[1]} without, {row[2]} with PRe ({row[3]})." for row in cost)
        + f" Commit {stamp['commit']}, {facts['machine']}; the experiment took {facts['took']}.",
    ]
    return "\n".join(lines)


def cpu_section(*runs: Path) -> str:
    """The CPU benchmark's tables, a machine's after another's."""
    return "\n\n".join(format_tables(json.loads(run.read_text())["benchmarks"]) for run in runs)


def few_shot_section() -> str:
    """The tables of the demo's sweep; its pictures, into docs/images/."""
    results = _few_shot()
    runs = finished(results.config, FEW_SHOT)
    with tempfile.TemporaryDirectory() as directory:
        for name, picture in plot_sweep(results, Path(directory)).items():
            shutil.copy(picture, ROOT / "docs" / "images" / f"few-shot-{name}.png")
    return markdown(results, stamps(runs))


def pays_section() -> str:
    """What somebody gets and loses: rows of the demo's sweep, a setting a column."""
    results = _few_shot()
    test, layer = results.config.experiment.transfer, results.config.experiment.run.pre.layer
    baseline, *settings = [point for point in points(results.config) if point.name in PAYS]
    new = f"new kinds of question, learned from {test.scenes} scenes"
    rows = {f"{new}, {TRAINED[x]} (%)": (learned(x, test.scenes), 100, ".1f") for x in test.frozen}
    rows["the questions of the training (%)"] = (at("mean_accuracy"), 100, ".1f")
    probes = f"linear probes at layer {layer} of what no question asks (%)"
    rows[probes] = (unasked(layer), 100, ".1f")
    rows["the language model's loss (nats)"] = (at("lm_loss"), 1, ".3f")
    titles = (f"{PAYS[p.name]}, {results.seeds(p)} seeds" for p in settings)
    lines = [f"| | without PRe | {' | '.join(titles)} |", "|---|---|" + "---|" * len(settings)]
    for label, (get, scale, digits) in rows.items():
        runs = results.by_point[baseline.name].values()
        level = scale * sum(map(get, runs)) / len(runs)
        effects = [results.effect(point, get).difference for point in settings]
        cells = [plus_minus(x, scale, digits) + " \\*" * (x.direction != 0) for x in effects]
        lines.append(f"| {label} | {level:{digits}} | {' | '.join(cells)} |")
    return "\n".join(lines)


def depth_section() -> str:
    """The tables of where the unasked is lost; its pictures, into docs/images/."""
    stored = json.loads(depth.OUT.read_text())
    depth.plot(stored, ROOT / "docs" / "images")
    return depth.format_table(stored)


def lora_sentence() -> str:
    """What PRe gives beside a LoRA adapter, against all that one may come from."""
    stored = json.loads(adapters.OUT.read_text())
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in adapters.VARIANTS}
    measure = next(iter(MEASURES.values()))  # new questions, tower and projector frozen
    for row in sorted(stored["runs"], key=lambda row: row["seed"]):
        rows[row["variant"]].append(dict(measure(row)))

    def gain(before: str, after: str) -> str:
        levels = ([fmean(row.values()) for row in rows[name]] for name in (before, after))
        return plus_minus(Effect.of(*levels).difference, 100, ".1f")

    both = "adapter and projector"
    return (
        "In [a study](docs/pays.md#for-whom-does-it-pay) of a small model, PRe gained "
        f"{gain('adapter', 'adapter, PRe')} points on new questions beside a frozen projector, "
        f"which is nothing, and {gain(both, f'{both}, PRe')} where the projector trained. A "
        "projector that trains without PRe loses some points, which are part of that gain. "
        "Against an adapter beside a frozen projector, without PRe, the gain is "
        f"{gain('adapter', f'{both}, PRe')}."
    )


def study_section(study: ModuleType) -> str:
    """The table of a study whose results are one file."""
    if not study.OUT.exists():
        return NOT_RUN
    table: str = study.format_table(json.loads(study.OUT.read_text()))
    return table


def photographs_section() -> str:
    """The tables of the study with photographs; its pictures, into docs/images/."""
    photographs.draw_scenes(ROOT / "docs" / "images" / "photographs.png")
    if not photographs.KEPT.exists():
        return NOT_RUN
    config = photographs.sweep_config()
    check_sweep(config, photographs.KEPT)
    runs = finished(config, photographs.KEPT)
    means = "; ".join(f"*{name}*: {what}" for name, what in MEANS.items())
    table = markdown(SweepResults(config, runs), stamps(runs))
    return f"{table}\n\nWhat the names stand for here. {means}."


def sweep_section() -> str:
    """The tables of an earlier sweep, about another centre."""
    stored = json.loads((RESULTS / "fidelity.json").read_text())
    del stored["config"]["experiment"]["transfer"]  # of another kind then, and not run
    results = SweepResults(from_dict(SweepConfig, stored["config"]), stored["runs"])
    return markdown(results, stamps(stored["runs"]))


def token_fraction_section() -> str:
    """The token_fraction benchmark's table."""
    return format_table(json.loads((RESULTS / "token_fraction.json").read_text()))


def fill(path: Path, marker: str, content: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->`."""
    pattern = re.compile(rf"(<!-- {marker} -->\n?).*?(\n?<!-- /{marker} -->)", re.DOTALL)
    text = path.read_text()
    if not pattern.search(text):
        raise ValueError(f"{path}: no <!-- {marker} --> ... <!-- /{marker} -->")
    path.write_text(pattern.sub(lambda found: found[1] + content + found[2], text))


def main() -> None:
    """Fill every marker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-demo", type=Path, metavar="DIR")
    parser.add_argument("--keep-sweep", type=Path, metavar="DIR")
    parser.add_argument("--commit", help="of that demo; default: this checkout's")
    options = parser.parse_args()
    if options.keep_demo:
        describe = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True)
        keep_demo(options.keep_demo, options.commit or found.stdout.strip())
    if options.keep_sweep:
        keep_sweep(options.keep_sweep, FEW_SHOT)
    fill(ROOT / "README.md", "cost", cost_sentence())
    fill(ROOT / "README.md", "gain", gain_sentence())
    fill(ROOT / "README.md", "lora", lora_sentence())
    fill(ROOT / "README.md", "claim", claim_section())
    fill(ROOT / "docs" / "pays.md", "pays", pays_section())
    fill(ROOT / "docs" / "pays.md", "cost", cost_sentence())
    fill(ROOT / "docs" / "demo.md", "demo", demo_section())
    fill(ROOT / "docs" / "performance.md", "cpu-table", cpu_section(CPU_RUN))
    fill(ROOT / "docs" / "history.md", "older-cpu-table", cpu_section(*OLDER_CPU_RUNS))
    fill(ROOT / "docs" / "fidelity.md", "few-shot", few_shot_section())
    fill(ROOT / "docs" / "why.md", "depth", depth_section())
    fill(ROOT / "docs" / "fidelity.md", "photographs", photographs_section())
    fill(ROOT / "docs" / "fidelity.md", "claims", study_section(claims))
    fill(ROOT / "docs" / "fidelity.md", "merging", study_section(merging))
    fill(ROOT / "docs" / "fidelity.md", "deepstack", study_section(deepstack))
    fill(ROOT / "docs" / "fidelity.md", "tuning", study_section(tuning))
    fill(ROOT / "docs" / "fidelity.md", "adapters", study_section(adapters))
    fill(ROOT / "docs" / "history.md", "sweep", sweep_section())
    fill(ROOT / "docs" / "anchors.md", "token-fraction", token_fraction_section())


if __name__ == "__main__":
    main()
