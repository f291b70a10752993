# SPDX-License-Identifier: Apache-2.0
"""What the experiment's pictures say without their text."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from prereg_kernels._util.settings_file import load_config
from prereg_kernels.checkup.report.style import theme
from prereg_kernels.demo.experiment.experiment import VARIANTS, ExperimentConfig
from prereg_kernels.demo.experiment.plots import probes, scenes, training, transfer
from prereg_kernels.demo.experiment.summary import Results, learned

DEMO = Path(__file__).parents[2] / "benchmarks" / "results" / "demo.json"


def test_probes_have_one_scale_and_name_their_bands() -> None:
    demo = json.loads(DEMO.read_text())
    results = Results(demo["results"])
    with theme("light") as colours:
        drawing = probes(results, 4, colours)
    [(low, high)] = {axis.get_ylim() for axis in drawing.panels}
    every = [
        100 * value
        for result in demo["results"]
        for name in ("digit", "polarity", "tilt", "texture", "thickness")
        for value in result["probe"][name]
    ]
    assert low <= min(every) and max(every) <= high == 100
    [legend] = drawing.figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown[-2:] == ["band: ± the standard deviation over seeds", "the layer with PRe"]
    # A band and a line, of which no reader takes one for the other
    band, line = legend.legend_handles[-2:]
    assert isinstance(band, Patch) and isinstance(line, Line2D)


def test_each_seed_has_a_dot_of_its_own() -> None:
    """Where two of PRe's answered equally many, too."""
    stored = json.loads(DEMO.read_text())["results"]
    first, second, *_ = (row for row in stored if row["variant"] == "pre")
    second["transfer"] = first["transfer"]
    results = Results(stored)
    values = results.values("pre", learned(*results.transfers[0]))
    assert values[0] == values[1]
    with theme("light") as colours:
        drawing = transfer(results, colours)
    [axis] = drawing.figure.axes
    dots = [line.get_xydata() for line in axis.lines if line.get_marker() == "."]
    assert len(dots) == len(VARIANTS) * len(results.transfers)
    for places in dots:
        assert len({tuple(place) for place in places}) == len(results.seeds)


def test_the_losses_have_names_in_words(tmp_path: Path) -> None:
    results = Results(json.loads(DEMO.read_text())["results"])
    for seed in results.seeds:
        for variant in VARIANTS:
            run = tmp_path / f"seed-{seed}" / variant
            run.mkdir(parents=True)
            rows = [{"step": i + 1, "lm_loss": 1.0, "pre_loss": -0.5} for i in range(20)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with theme("light") as colours:
        drawing = training(results, tmp_path, colours)
    assert [words.partition(",")[0] for words in drawing.words] == [
        "Language-model loss", "PRe loss"
    ]  # fmt: skip
    assert "baseline 1.000" in drawing.words[0] and "PRe -0.500" in drawing.words[1]


def test_scenes_say_what_is_shown() -> None:
    config = load_config(
        Path(str(files("prereg_kernels.demo") / "presets" / "scenes.yaml")), ExperimentConfig
    )
    with theme("light"):
        drawing = scenes(config, count=2)
    assert "digit in the frame" in drawing.figure.get_suptitle()
