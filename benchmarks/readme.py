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
from pathlib import Path

from benchmarks.loss.cpu_table import format_tables
from benchmarks.studies.token_fraction import format_table

ROOT = Path.cwd()  # the top of a checkout, where `python -m benchmarks.readme` runs
RESULTS = ROOT / "benchmarks" / "results"
FEW_SHOT = RESULTS / "few_shot"


def keep_demo(directory: Path, commit: str) -> None:
    """Copy a demo's summary into results/, with the commit it was made at and the machine."""
    summary = json.loads((directory / "summary.json").read_text())
    stamp = {"commit": commit, "processor": platform.processor() or platform.machine()}
    text = json.dumps({"stamp": stamp, **summary}, indent=1)
    (RESULTS / "demo.json").write_text(text + "\n")


def keep_sweep(directory: Path) -> None:
    """Copy a sweep's settings and each finished run's result, which says where it was made. A sweep
    that is begun in a copy of them goes on with what is missing."""
    for path in (directory / "sweep.json", *directory.glob("seed-*/*/result.json")):
        kept = FEW_SHOT / path.relative_to(directory)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)


def demo_section() -> str:
    """The demo's sentences and its main rows."""
    demo = json.loads((RESULTS / "demo.json").read_text())
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


def cpu_section() -> str:
    """The CPU benchmark's tables."""
    return format_tables(json.loads((RESULTS / "cpu.json").read_text())["benchmarks"])


def few_shot_section() -> str:
    """The tables of the demo's sweep; its pictures, into docs/images/."""
    from prereg_kernels.cli.demo import load_sweep
    from prereg_kernels.demo.sweep.plots import plot_sweep
    from prereg_kernels.demo.sweep.report import SweepResults, markdown
    from prereg_kernels.demo.sweep.sweep import check_sweep, finished

    config = load_sweep("scenes")
    check_sweep(config, FEW_SHOT)
    runs = finished(config, FEW_SHOT)
    results = SweepResults(config, runs)
    with tempfile.TemporaryDirectory() as directory:
        for name, picture in plot_sweep(results, Path(directory)).items():
            shutil.copy(picture, ROOT / "docs" / "images" / f"few-shot-{name}.png")
    return markdown(results, [run["stamp"] for run in runs])


def sweep_section() -> str:
    """The tables of an earlier sweep, about another centre."""
    from prereg_kernels._util.settings_file import from_dict
    from prereg_kernels.demo.sweep.report import SweepResults, markdown
    from prereg_kernels.demo.sweep.sweep import SweepConfig

    stored = json.loads((RESULTS / "fidelity.json").read_text())
    del stored["config"]["experiment"]["transfer"]  # of another kind then, and not run
    results = SweepResults(from_dict(SweepConfig, stored["config"]), stored["runs"])
    return markdown(results, [run["stamp"] for run in stored["runs"]])


def token_fraction_section() -> str:
    """The token_fraction benchmark's table."""
    return format_table(json.loads((RESULTS / "token_fraction.json").read_text()))


def fill(path: Path, marker: str, content: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->`."""
    pattern = re.compile(rf"<!-- {marker} -->.*?<!-- /{marker} -->", re.DOTALL)
    text = path.read_text()
    if not pattern.search(text):
        raise ValueError(f"{path}: no <!-- {marker} --> ... <!-- /{marker} -->")
    block = f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->"
    path.write_text(pattern.sub(lambda _: block, text))


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
        keep_sweep(options.keep_sweep)
    fill(ROOT / "README.md", "demo", demo_section())
    fill(ROOT / "README.md", "cpu-table", cpu_section())
    fill(ROOT / "docs" / "fidelity.md", "few-shot", few_shot_section())
    fill(ROOT / "docs" / "fidelity.md", "sweep", sweep_section())
    fill(ROOT / "docs" / "anchors.md", "token-fraction", token_fraction_section())


if __name__ == "__main__":
    main()
