# SPDX-License-Identifier: Apache-2.0
"""Which images and patches have maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prereg_kernels.checkup.images.datasets import ImageFolder
from prereg_kernels.checkup.images.image_batches import ImageBatches
from prereg_kernels.checkup.report.maps import maps, patch_at
from prereg_kernels.checkup.report.style import theme
from prereg_kernels.checkup.results import CheckupResults
from prereg_kernels.checkup.run import checkup, report
from tests.checkup.pictures import QWEN_PROCESSOR, make_loaded, pillow, save_folder

NAMES = ["light/08.png", "dark/03.png"]


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> ImageBatches:
    root = save_folder(tmp_path_factory.mktemp("set"), 12)
    loaded = make_loaded("qwen2_5_vl", pillow("Qwen2VL", **QWEN_PROCESSOR))
    return ImageBatches(loaded, ImageFolder(root / "images"), size=4)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def found(batches: ImageBatches, out: Path) -> CheckupResults:
    return checkup(batches._loaded.model, batches, out, splits=2, shown=NAMES)


def test_the_images_that_are_named_in_their_order(found: CheckupResults) -> None:
    assert [image.name for image in found.measured.shown()] == NAMES


def test_other_images_cost_their_batches_alone(
    batches: ImageBatches, found: CheckupResults, out: Path
) -> None:
    """Nothing else depends on which are shown."""
    model: Any = batches._loaded.model
    forwards = []
    hook = model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    other = checkup(model, batches, out, splits=2, shown=["dark/05.png"])
    assert len(forwards) == 1
    again = checkup(model, batches, out, splits=2, shown=NAMES)
    hook.remove()
    assert len(forwards) == 1
    assert other.curves == again.curves == found.curves
    [shown] = other.measured.shown()
    picture = ImageFolder(batches._samples._root)[2].image  # of 01, 03, 05, ...
    assert np.array_equal(shown.picture, picture)
    assert not shown.patches.equal(again.measured.shown()[1].patches)
    with pytest.raises(ValueError, match=r"shown: expected names of measured images, got no\.png"):
        checkup(model, batches, out, splits=2, shown=["no.png"])
    with pytest.raises(
        TypeError, match=r"shown: expected a number or a list of names, got 'no\.png'"
    ):
        checkup(model, batches, out, splits=2, shown="no.png")


def test_the_patch_of_a_pixel(found: CheckupResults, tmp_path: Path) -> None:
    """The picture, 32 x 40, has 4 x 5 patches of 8 x 8 pixels."""
    image = found.measured.shown()[0]
    assert image.grid == (4, 5)
    assert [patch_at(image, pixel) for pixel in ((0, 0), (8, 0), (39, 31), (17, 9))] == [
        0, 1, 19, 7,
    ]  # fmt: skip
    x = image.patches.double() - found.measured.mean()[:, None]
    expected = torch.nn.functional.cosine_similarity(x[2], x[2, 7:8], dim=1).mean()
    with theme("light") as colours:
        [words] = maps([found], [image], colours, (17, 9)).words
    assert f"{expected:.2f}".replace("-", "−") + " layer 2" in words
    message = "light/08.png: expected a pixel x,y of its 40 x 32 that a patch covers, got 40,3"
    with pytest.raises(ValueError, match=message):
        report(tmp_path, [found], pixels={NAMES[0]: (40, 3)})
