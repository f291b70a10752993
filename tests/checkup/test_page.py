# SPDX-License-Identifier: Apache-2.0
"""The page says in words and in figures what its pictures show, of one model and of two."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels.checkup.images.datasets import ImageFolder
from prereg_kernels.checkup.images.image_batches import ImageBatches
from prereg_kernels.checkup.report.findings import headline_of_two, tiles_of
from prereg_kernels.checkup.report.pictures import Drawing, draw_all
from prereg_kernels.checkup.report.style import curve, legend, panels, theme
from prereg_kernels.checkup.results import CheckupResults, differences
from prereg_kernels.checkup.run import checkup, report
from tests.checkup.pictures import QWEN_PROCESSOR, make_loaded, pillow, save_folder

MIDDLE, LAST = 2, 4  # of the tiny model's layers


class Read(HTMLParser):
    """Elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[CheckupResults]:
    """Two models that differ in a layer, measured on images with classes and masks."""
    root = save_folder(tmp_path_factory.mktemp("set"), 12)
    loaded = make_loaded("qwen2_5_vl", pillow("Qwen2VL", **QWEN_PROCESSOR))
    images = ImageFolder(root / "images", masks=root / "masks", masks_are="classes")
    batches = ImageBatches(loaded, images, size=6)
    model: Any = loaded.model
    first = checkup(model, batches, root, name="baseline", splits=2)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(3)
    return [first, checkup(model, batches, root, name="PRe", splits=2)]


@pytest.fixture(scope="module")
def page(models: list[CheckupResults], tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(tmp_path_factory.mktemp("two"), models).read_text()


def test_pictures_are_told_with_their_figures(models: list[CheckupResults], page: str) -> None:
    texts = [image["alt"] for image in Read(page).all("img")]
    assert all(texts) and len(set(texts)) == len(texts)
    [contrast] = [text for text in texts if text.startswith("Contrast, over the layers.")]
    for model in models:
        start, middle, last = (model.curves["contrast"][i].value for i in (0, MIDDLE, LAST))
        assert (
            f"{model.name}: {start:.3f} at the input, {middle:.3f} at layer {MIDDLE}, {last:.3f} "
            f"at layer {LAST}"
        ) in contrast
    [probed] = [text for text in texts if text.startswith("Probe of image: class")]
    for model in models:
        value = model.curves["image: class"][LAST].value
        assert f"{100 * value:.1f}% at layer {LAST} (always the commonest class: " in probed
    [silenced] = [text for text in texts if text.startswith("Silenced tokens")]
    assert f"{100 * models[1].curves['silenced tokens'][0].value:.1f}% at the input" in silenced


def test_tables_and_areas_are_marked_up(page: str) -> None:
    read = Read(page)
    assert len(read.all("main")) == len(read.all("h1")) == 1
    assert {head.get("scope") for head in read.all("th")} == {"col", "row"}
    areas = [x for x in read.all("div") if x.get("class") == "scroll"]
    assert len(areas) == 6  # two of maps, two of words, two of figures
    assert all(area["tabindex"] == "0" and area["aria-label"] for area in areas)
    assert page.count('class="scroll"') == len(areas)


def test_a_comparison_speaks_of_both(models: list[CheckupResults], page: str) -> None:
    first, second = models
    apart = differences(first, second)
    a, b = (model.curves["contrast"][MIDDLE].value for model in models)
    said = headline_of_two(first, second, apart)
    assert said.startswith(f"PRe against baseline at layer {MIDDLE} of {LAST}: image probe acc")
    word = {1: "higher", -1: "lower", 0: "no clear difference"}[apart["contrast"][MIDDLE].direction]
    assert f"contrast {b:.3f} against {a:.3f}, {word}" in said
    assert said in page
    assert models[1].curves["contrast"] != models[0].curves["contrast"]

    tiles = dict(tiles_of(models))
    assert [name for name, _ in tiles["contrast"]] == ["baseline", "PRe"]
    assert [tile.after for _, tile in tiles["contrast"]] == [f"{a:.2f}", f"{b:.2f}"]
    shown = re.findall(r'class="who">(\w+)<', page)
    assert shown == ["baseline", "PRe"] * len(tiles)
    for model in models:
        assert f"<h2>{model.name}, from the input to layer {MIDDLE}</h2>" in page


def test_a_comparison_without_probes_or_masks(tmp_path: Path) -> None:
    """The cosine is all that there is to say; and what would bring more is said once."""
    root = save_folder(tmp_path, 6)
    loaded = make_loaded("qwen2_5_vl", pillow("Qwen2VL", **QWEN_PROCESSOR))
    batches = ImageBatches(loaded, ImageFolder(root / "images" / "dark"))
    models = [checkup(loaded.model, batches, root, name=name) for name in ("a", "b")]
    cosine = f"{models[0].curves['cosine to input'][MIDDLE].value:.3f}".replace("-", "−")
    said = headline_of_two(models[0], models[1], differences(*models))
    assert said == (
        f"b against a at layer 2 of 4: cosine to input {cosine} against {cosine}, no clear "
        "difference."
    )
    page = report(tmp_path / "out", models).read_text()
    for line in (
        "No image has a class: a folder for each class, or a file of labels, brings a probe of "
        "whole images.",
        "No patch is known to be of an object: masks bring the contrast of patches and, where the "
        "objects have classes, a probe of objects.",
    ):
        assert page.count(line) == 1


def test_what_is_there_is_not_asked_for(models: list[CheckupResults]) -> None:
    assert models[0].notes == ()


def test_a_theme_drawn_in_the_layout_of_another_is_as_drawn_alone(tmp_path: Path) -> None:
    """With letters, a legend and axes whose shape an image decides."""

    def draw(colours: Mapping[str, str]) -> Iterator[tuple[str, Drawing]]:
        figure, axes = panels(3, size=(9, 3))
        axes[0].imshow([[0, 1], [1, 0]], cmap="gray")
        for axis in axes[1:]:
            curve(axis, [1, 20, 300], [0, 1, 2], [3, 40, 500], color=colours["first"], label="a")
            axis.set(title="of depth", ylabel="value")
        legend(figure, axes[1])
        yield "picture", Drawing(figure, ["", "", ""], axes)

    draw_all(draw, tmp_path)
    for name, ending in (("light", ""), ("dark", "-dark")):
        with theme(name) as colours:
            [(_, alone)] = draw(colours)
            assert alone._repr_png_() == (tmp_path / f"picture{ending}.png").read_bytes()
