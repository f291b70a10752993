# SPDX-License-Identifier: Apache-2.0
"""Pictures of one image: what its patches resemble, layer by layer, on the image itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from prereg_kernels.checkup.measured import Shown
from prereg_kernels.checkup.measures.tensors import check_features
from prereg_kernels.checkup.report.pictures import Drawing
from prereg_kernels.checkup.report.style import plain
from prereg_kernels.checkup.results import CheckupResults
from prereg_kernels.checkup.words import fixed

COLUMNS = 7
"""Layers in a row of maps, at most."""


def drawable(shown: Shown) -> bool:
    """Whether the places of its tokens are known."""
    return shown.grid is not None and shown.picture is not None and shown.boxes is not None


def layers_shown(layers: int) -> list[int]:
    """The layers that maps show: evenly apart, from the input to the last."""
    count = min(COLUMNS, layers)
    return sorted({round(i * (layers - 1) / max(1, count - 1)) for i in range(count)})


def chosen_patch(shown: Shown) -> int:
    """The token whose similarities are drawn: the middle one of the largest object, else of all."""
    assert shown.places is not None and shown.grid is not None
    candidates = np.flatnonzero(shown.places[0] >= 0)
    if shown.objects is not None and (shown.objects >= 0).any():
        ids, sizes = np.unique(shown.objects[shown.objects >= 0], return_counts=True)
        candidates = np.flatnonzero(shown.objects == ids[sizes.argmax()])
    places = shown.places[:, candidates].astype(float)
    centre = places.mean(axis=1, keepdims=True)
    return int(candidates[((places - centre) ** 2).sum(axis=0).argmin()])


def patch_at(shown: Shown, pixel: tuple[int, int]) -> int:
    """The token whose box a pixel (x, y) of the image is in.

    Raises:
        ValueError: there is none.
    """
    assert shown.boxes is not None and shown.places is not None and shown.picture is not None
    x, y = (place + 0.5 for place in pixel)
    top, left, bottom, right = shown.boxes.T
    inside = (left <= x) & (x < right) & (top <= y) & (y < bottom) & (shown.places[0] >= 0)
    if not inside.any():
        height, width = shown.picture.shape[:2]
        raise ValueError(
            f"{shown.name}: expected a pixel x,y of its {width} x {height} that a patch covers, "
            f"got {pixel[0]},{pixel[1]}"
        )
    return int(inside.argmax())


def maps(
    models: Sequence[CheckupResults],
    shown: Sequence[Shown],
    colours: Mapping[str, str],
    pixel: tuple[int, int] | None = None,
) -> Drawing:
    """One image, a column a layer. For each model, a row of similarities: the cosine of every patch
    to a chosen one, the mean patch (over all images) subtracted, since what all patches share would
    make every map bright; the scale is from -1 to 1 throughout. Then, for each model, a row of
    patches coloured by `aligned_components`.

    Args:
        pixel: (x, y) in the patch that is marked; None: that of `chosen_patch`.
    """
    layers = layers_shown(models[0].layers)
    sheet = _Sheet(2 * len(models), len(layers) + 1, shown[0])
    drawn = None
    words = [f"{shown[0].name}: mean cosine of its patches to the marked one"]
    for row, (model, image) in enumerate(zip(models, shown, strict=True)):
        mean = model.measured.mean()
        means = []
        patch = chosen_patch(image) if pixel is None else patch_at(image, pixel)
        sheet.picture(row, image, patch)
        for column, layer in enumerate(layers, start=1):
            x = image.patches[layer].double() - mean[layer]
            similar = torch.nn.functional.cosine_similarity(x, x[patch : patch + 1], dim=1)
            assert image.places is not None
            means.append(float(similar[torch.from_numpy(image.places[0] >= 0)].mean()))  # drawn
            axis = sheet.axes[row][column]
            drawn = _overlay(axis, image, similar.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
            _mark(axis, image, patch)
        levels = (
            f"{fixed(value, 2)} {_place(at)}" for value, at in zip(means, layers, strict=True)
        )
        words.append(f"{model.name}: {', '.join(levels)}")
    first: Tensor | None = None
    for row, (model, image) in enumerate(zip(models, shown, strict=True), start=len(models)):
        scores = aligned_components(model, image, layers, first)
        first = scores[0]
        sheet.picture(row, image, None)
        for column, x in enumerate(scores, start=1):
            _overlay(sheet.axes[row][column], image, _as_colours(x).numpy(), alpha=1.0)
    names = [plain(model.name) if len(models) > 1 else "" for model in models]
    kinds = ("similarity", "components")
    sheet.label(
        ["image", *map(_place, layers)],
        [f"{name}\n{kind}".strip() for kind in kinds for name in names],
        colours,
    )
    assert drawn is not None
    sheet.scale(drawn, len(models), "cosine to the marked patch", colours)
    return Drawing(sheet.figure, [". ".join(words) + "."])


def _place(layer: int) -> str:
    return f"layer {layer}" if layer else "input"


def aligned_components(
    model: CheckupResults, image: Shown, layers: Sequence[int], first: Tensor | None = None
) -> list[Tensor]:
    """An image's patches on the first three principal components of each layer.

    Each layer has its own components, of a sample of all images' patches: layers differ in scale
    and mean, and one basis for all would show little but that. Each layer's scores are then rotated
    to agree best with those of the layer before (orthogonal Procrustes), so that a patch changes
    colour only where its relations to other patches change.

    Args:
        first: scores that the first layer's are rotated to; another model's.

    Returns:
        (N, 3) float64 a layer, in standard deviations of the sample.

    Raises:
        ValueError: patches that are not finite.
    """
    scores: list[Tensor] = []
    before = first
    for layer in layers:
        check_features(image.patches[layer], "patches")
        sample = model.measured.sample(layer).double()
        mean = sample.mean(dim=0)
        count = min(3, *sample.shape)
        with torch.random.fork_rng(devices=[]):  # the solver draws a random start
            torch.manual_seed(0)
            _, values, basis = torch.svd_lowrank(sample - mean, q=min(count + 6, *sample.shape))
        deviation = (values[:count] / len(sample) ** 0.5).clamp_min(1e-12)
        x = (image.patches[layer].double() - mean) @ basis[:, :count] / deviation
        x = torch.nn.functional.pad(x, (0, 3 - count))
        if before is not None:
            left, _, right = torch.linalg.svd(x.T @ before)
            x = x @ (left @ right)
        scores.append(x)
        before = x
    return scores


def _as_colours(scores: Tensor) -> Tensor:
    """Scores of -2 to 2 deviations as (N, 3) in [0, 1]."""
    return (scores / 4 + 0.5).clamp(0, 1)


class _Sheet:
    """A table of small pictures of one size, with room for names at the left and a scale at the
    right."""

    left, right, top, gap, bottom = 0.55, 0.75, 0.32, 0.07, 0.05  # inches

    def __init__(self, rows: int, columns: int, image: Shown) -> None:
        assert image.picture is not None
        height, width = image.picture.shape[:2]
        self._width = (13.0 - self.left - self.right) / columns - self.gap
        self._height = self._width * min(max(height / width, 0.4), 2.0)
        size = 13.0, self.top + rows * (self._height + self.gap) + self.bottom
        self.figure = Figure(figsize=size)
        self._size = size
        self.axes = [[self._axis(row, column) for column in range(columns)] for row in range(rows)]

    def _axis(self, row: int, column: int) -> Axes:
        x = self.left + column * (self._width + self.gap)
        y = self._size[1] - self.top - (row + 1) * (self._height + self.gap) + self.gap
        axis = self.figure.add_axes(self._share(x, y, self._width, self._height))
        axis.set_axis_off()
        return axis

    def picture(self, row: int, image: Shown, patch: int | None) -> None:
        """The image itself, in the first column."""
        assert image.picture is not None
        axis = self.axes[row][0]
        axis.imshow(image.picture, extent=_extent(image.picture), interpolation="nearest")
        if patch is not None:
            _mark(axis, image, patch)

    def label(
        self, columns: Sequence[str], rows: Sequence[str], colours: Mapping[str, str]
    ) -> None:
        """Names above the columns and beside the rows."""
        for axis, text in zip(self.axes[0], columns, strict=True):
            axis.set_title(text, fontsize=10, pad=4)
        for row, text in zip(self.axes, rows, strict=True):
            row[0].text(
                -0.06, 0.5, text, rotation=90, va="center", ha="right", color=colours["soft"],
                transform=row[0].transAxes, fontsize=9, multialignment="center",
            )  # fmt: skip

    def scale(self, drawn: Any, rows: int, text: str, colours: Mapping[str, str]) -> None:
        """A colour bar beside the first rows."""
        height = rows * (self._height + self.gap) - self.gap
        y = self._size[1] - self.top - height
        x = self._size[0] - self.right + 0.08
        bar = self.figure.colorbar(
            drawn, cax=self.figure.add_axes(self._share(x, y, 0.11, height)), ticks=[-1, 0, 1]
        )
        bar.set_label(text, color=colours["soft"], fontsize=9)
        bar.outline.set_visible(False)

    def _share(
        self, x: float, y: float, width: float, height: float
    ) -> tuple[float, float, float, float]:
        return (
            x / self._size[0], y / self._size[1], width / self._size[0], height / self._size[1],
        )  # fmt: skip


def _overlay(axis: Axes, image: Shown, values: NDArray[Any], alpha: float = 0.8, **how: Any) -> Any:
    """Paint a value a token over the picture, in the place of each."""
    assert image.picture is not None and image.boxes is not None
    assert image.places is not None and image.grid is not None
    grey = image.picture.mean(axis=2)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=_extent(image.picture))
    placed = image.places[0] >= 0
    table = np.full((*image.grid, *values.shape[1:]), np.nan)
    table[image.places[0, placed], image.places[1, placed]] = values[placed]
    boxes = image.boxes[placed]
    extent = (boxes[:, 1].min(), boxes[:, 3].max(), boxes[:, 2].max(), boxes[:, 0].min())
    drawn = axis.imshow(table, extent=extent, alpha=alpha, interpolation="nearest", **how)
    axis.set_xlim(0, image.picture.shape[1])
    axis.set_ylim(image.picture.shape[0], 0)
    return drawn


def _mark(axis: Axes, image: Shown, patch: int) -> None:
    assert image.boxes is not None
    top, left, bottom, right = image.boxes[patch]
    for colour, width in (("black", 3.0), ("white", 1.5)):
        axis.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=width
            )
        )


def _extent(picture: NDArray[np.uint8]) -> tuple[float, float, float, float]:
    return 0, picture.shape[1], picture.shape[0], 0
