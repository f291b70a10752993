# SPDX-License-Identifier: Apache-2.0
"""The whole checkup against the measures of one shot, on features that transformers itself gives;
what it does after a kill, and with what it cannot use."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prereg_kernels.attach.family import Family
from prereg_kernels.checkup import collect as collecting
from prereg_kernels.checkup import (
    logit_lens,
    patch_structure,
    pool,
    probe,
    similarity,
    spectrum,
    token_norms,
    visual_features,
)
from prereg_kernels.checkup.batches import Batch, ImageFacts
from prereg_kernels.checkup.images.datasets import ImageFolder, Subset
from prereg_kernels.checkup.images.image_batches import ImageBatches
from prereg_kernels.checkup.intervals import Estimate
from prereg_kernels.checkup.measures.sources import COSINE
from prereg_kernels.checkup.report.findings import (
    comparison,
    headline,
    middle_layer,
    sentences,
    tiles,
)
from prereg_kernels.checkup.report.page import as_json
from prereg_kernels.checkup.report.plots import CURVES
from prereg_kernels.checkup.report.style import theme
from prereg_kernels.checkup.results import CheckupResults, differences
from prereg_kernels.checkup.run import checkup, report
from tests.attach.families.models import LAYERS
from tests.checkup.pictures import QWEN_PROCESSOR, make_loaded, pillow, save_folder

COUNT = 24


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> ImageBatches:
    root = save_folder(tmp_path_factory.mktemp("set"), COUNT)
    for path in root.rglob("*[369].png"):  # another size, so that rows of a batch are padded
        Image.open(path).crop((0, 0, 40, 24)).save(path)
    (root / "images" / "dark" / "zz.png").write_text("not an image")
    processor = pillow("Qwen2VL", **QWEN_PROCESSOR)
    loaded = make_loaded("qwen2_5_vl", processor)
    images = ImageFolder(root / "images", masks=root / "masks", masks_are="classes")
    return ImageBatches(loaded, images, size=5)


@pytest.fixture(scope="module")
def found(batches: ImageBatches, tmp_path_factory: pytest.TempPathFactory) -> CheckupResults:
    model = batches._loaded.model
    return checkup(model, batches, tmp_path_factory.mktemp("out"), name="tiny", splits=3)


@pytest.fixture(scope="module")
def truth(batches: ImageBatches) -> dict[str, Any]:
    """Features of all patches from `output_hidden_states`, an image at a time, unpadded."""
    model: Any = batches._loaded.model
    last: list[torch.Tensor] = []
    hook = model.model.language_model.layers[-1].register_forward_hook(
        lambda module, args, output: last.append(output[0] if type(output) is tuple else output)
    )
    states, objects, images, labels, names = [], [], [], [], []
    with torch.no_grad():
        for i in range(len(batches)):
            batch = ImageBatches(batches._loaded, batches._samples, size=5)[i]
            for facts in batch.images:
                alone = ImageBatches(batches._loaded, _Only(batches._samples, facts.name), size=1)
                inputs = alone[0].inputs
                output = model(**inputs, output_hidden_states=True)
                visual = inputs["input_ids"] == model.config.image_token_id
                # transformers' last hidden state comes after the final norm
                layers = [*output.hidden_states[:-1], last.pop()]
                states.append(torch.stack([layer[visual] for layer in layers]))
                objects.append(torch.from_numpy(facts.objects))
                images.append(torch.full((states[-1].shape[1],), len(images)))
                labels.append(facts.labels["class"])
                names.append(facts.name)
    hook.remove()
    return {
        "layers": torch.cat(states, dim=1),
        "objects": torch.cat(objects),
        "images": torch.cat(images),
        "labels": torch.tensor([["dark", "light"].index(label) for label in labels]),
        "names": names,
        "model": model,
    }


class _Only:
    """One image of a set."""

    def __init__(self, samples: Any, name: str) -> None:
        self._samples = samples
        self._index = next(i for i in range(len(samples)) if samples.name(i) == name)

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return str(self._samples.name(self._index))

    def __getitem__(self, index: int) -> Any:
        return self._samples[self._index]


def test_every_curve_is_the_measure_of_one_shot(
    found: CheckupResults, truth: dict[str, Any]
) -> None:
    assert found.layers == LAYERS + 1
    model = truth["model"]
    for depth, x in enumerate(truth["layers"]):
        structure = patch_structure(x, truth["objects"], truth["images"])
        similar = similarity(x, truth["layers"][0])
        spread = spectrum(x)
        norms = token_norms(x)
        lens = logit_lens(x, model.model.language_model.norm, model.lm_head.weight)
        expected = {
            "cohesion": structure.cohesion,
            "coupling": structure.coupling,
            "contrast": structure.contrast,
            "difference": structure.difference,
            "centred cohesion": structure.centred_cohesion,
            "centred coupling": structure.centred_coupling,
            "centred contrast": structure.centred_contrast,
            "centred difference": structure.centred_difference,
            "cosine to input": similar.cosine,
            "centred cosine to input": similar.centred_cosine,
            "CKA with input": similar.cka,
            "debiased CKA with input": similar.debiased_cka,
            "effective dimension": spread.effective_dimension,
            "mean correlation": spread.mean_correlation,
            "silenced tokens": lens.silenced,
            "entropy of top tokens": lens.entropy,
            "median norm": norms.median,
            "outlier tokens": norms.outliers,
            "massive activations": norms.massive,
        }
        for key, value in expected.items():
            assert found.curves[key][depth].value == pytest.approx(value, rel=2e-4, abs=2e-5), key
        assert found.lenses[depth].most_frequent == lens.most_frequent


def test_probes_are_those_of_pooled_features(found: CheckupResults, truth: dict[str, Any]) -> None:
    depth = 2
    x = truth["layers"][depth]
    images, _ = pool(x, truth["images"])
    expected = probe(images, truth["labels"], splits=3)
    assert found.probes["image: class"][depth].accuracies == expected.accuracies
    assert found.curves["image: class"][depth].value == pytest.approx(expected.mean)
    assert found.curves["image: class"][depth].low == pytest.approx(expected.interval[0])

    owned = truth["objects"] >= 0
    key = torch.where(owned, truth["images"] * 10 + truth["objects"], -1)
    things, ids = pool(x, key)
    expected = probe(things, ids % 10, groups=ids // 10, splits=3)
    assert found.probes["object: class"][depth].accuracies == expected.accuracies
    assert found.measured._labels("object")[1] == (ids // 10).tolist()


def test_rows_are_in_the_order_of_the_names(found: CheckupResults, truth: dict[str, Any]) -> None:
    """Which pairing two models by image relies on."""
    x, first = truth["layers"][2], truth["layers"][0]
    cosine = torch.nn.functional.cosine_similarity(x, first, dim=1)
    expected, _ = pool(cosine[:, None], truth["images"])
    assert found.measured.names == truth["names"]
    assert found.measured.tokens.tolist() == truth["images"].bincount().tolist()
    sums = found.measured.sums(COSINE)
    assert sums is not None
    means = sums["sum"][:, 2] / sums["tokens"][:, 2]
    assert means == pytest.approx(expected[:, 0].numpy(), rel=1e-4)


def test_massive_activations_of_all_batches(batches: ImageBatches, tmp_path: Path) -> None:
    model: Any = batches._loaded.model
    weight = model.model.language_model.layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[5] *= 2000
        x = visual_features(model, batches[0].inputs)[2]
        weight[5] *= 1000 * x.abs().median() / x[:, 5].abs().median()  # of about half the tokens
    found = checkup(model, batches, tmp_path, splits=2)
    features = [visual_features(model, batches[i].inputs)[2] for i in range(len(batches))]
    with torch.no_grad():
        weight.copy_(kept)
    expected = token_norms(torch.cat(features))
    assert 0.02 < expected.massive < 0.98
    assert found.curves["massive activations"][2].value == pytest.approx(expected.massive)
    assert found.curves["massive activations"][0].value == 0
    assert [one.dimension for one in expected.massive_dimensions] == [5]
    assert found.norms[2].massive_dimensions == expected.massive_dimensions
    numbers = as_json([found], {}, {})["models"][0]["massive_dimensions"]
    assert [[one["dimension"] for one in layer] for layer in numbers[:3]] == [[], [], [5]]


def test_changes_start_at_zero_and_intervals_hold_the_value(found: CheckupResults) -> None:
    for key in ("contrast", "centred difference", "cosine to input"):
        curve, change = found.curves[key], found.changes[key]
        assert change[0].value == change[0].low == change[0].high == 0
        for depth in range(1, found.layers):
            assert curve[depth].low < curve[depth].value < curve[depth].high
            difference = curve[depth].value - curve[0].value
            assert change[depth].value == pytest.approx(difference, abs=1e-12)


def test_what_could_not_be_used_is_counted(found: CheckupResults) -> None:
    assert found.measured.skipped == {"damaged, or not an image": ["dark/zz.png"]}
    assert len(found.measured.names) == COUNT


def test_features_stay_in_bounded_memory(found: CheckupResults) -> None:
    """Of a batch, no more patches are kept than asked for, but of the shown images."""
    shown = found.measured.shown()
    assert len(shown) == 2
    assert shown[0].patches.shape == (LAYERS + 1, 20, 32)
    drawn = collecting._draw("a", 576, 16)
    assert len(drawn.unique()) == 16
    assert collecting._draw("a", 576, 16).equal(drawn)
    assert not collecting._draw("b", 576, 16).equal(drawn)
    assert collecting._draw("a", 9, 16).tolist() == list(range(9))


class _KilledError(Exception):
    """What a test raises where a process would die."""


@pytest.mark.parametrize("after", [0, 2, 5, 7, 9])
def test_goes_on_after_a_kill(
    batches: ImageBatches, found: CheckupResults, tmp_path: Path, after: int
) -> None:
    model = batches._loaded.model
    done = []

    def die(phase: str, step: int, steps: int) -> None:
        done.append(step)
        if len(done) == after + 1:
            raise _KilledError

    with pytest.raises(_KilledError):
        checkup(model, batches, tmp_path, name="tiny", splits=3, progress=die)
    forwards = []
    hook = model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    again = checkup(model, batches, tmp_path, name="tiny", splits=3)
    hook.remove()
    assert len(forwards) == 2 * len(batches) - (after + 1)
    assert again.curves == found.curves


def _doubled(model: torch.nn.Module, inputs: Any, family: Any) -> list[torch.Tensor]:
    return [2 * x for x in visual_features(model, inputs)]


@pytest.mark.parametrize("what", ["code", "libraries"])
def test_shards_of_other_code_are_not_read(
    batches: ImageBatches, found: CheckupResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, what: str,
) -> None:  # fmt: skip
    """Another commit has the same version."""
    model = batches._loaded.model
    with monkeypatch.context() as patch:
        module = sys.modules[checkup.__module__]  # the package has a function of its name
        patch.setattr(module, "of_code", lambda: {what: "other"})
        patch.setattr(collecting, "visual_features", _doubled)
        checkup(model, batches, tmp_path, splits=3)
    again = checkup(model, batches, tmp_path, splits=3)
    assert again.curves == found.curves
    (record,) = caplog.records
    assert "had other" in record.getMessage() and what in record.getMessage()


def test_two_models_are_compared_image_by_image(
    batches: ImageBatches, found: CheckupResults, tmp_path: Path
) -> None:
    """The same model twice differs by exactly nothing; with another head, in the lens alone."""
    model: Any = batches._loaded.model
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.neg_()
    other = checkup(model, batches, tmp_path, name="other", splits=3)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    apart = differences(found, other)
    assert apart.keys() >= {"contrast", "image: class", "cosine to input"}
    for curve in apart.values():
        assert all(x == Estimate(0, 0, 0) for x in curve)
    assert found.lenses != other.lenses
    lines = comparison(found, other, apart)
    assert lines and all("no clear difference" in line for line in lines)


@pytest.fixture(scope="module")
def reported(found: CheckupResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a page."""
    missing = {"image: breed": "train_y: expected at least 2 classes, got 1"}
    return report(tmp_path_factory.mktemp("page"), [replace(found, missing=missing)]).parent


def test_the_page_needs_no_network(reported: Path) -> None:
    page = (reported / "checkup.html").read_text()
    assert "no probe of image: breed: train_y: expected at least 2" in page
    assert "://" not in re.sub(r"base64,[^\"]+", "", page)
    assert page.count("<picture>") == 17  # panels: 2 + 5 + 4 + 4; and two images
    for name in ("probes", "structure", "resemblance", "tokens", "maps-0", "maps-1"):
        for ending in (".png", "-dark.png"):
            assert (reported / "plots" / f"{name}{ending}").stat().st_size > 5000
    assert "1 image skipped:" in page and "dark/zz.png" in page
    assert "24 images are few" in page


def test_small_and_negative_numbers(found: CheckupResults) -> None:
    """A real minus sign, none before a zero, and no fall of 0%."""
    layer = middle_layer(found.layers)

    def moved(before: float, after: float) -> CheckupResults:
        curve = [Estimate(before if depth < layer else after) for depth in range(found.layers)]
        change = [Estimate(after - before, *sorted((2 * (after - before), 0.5 * (after - before))))]
        keys = ("contrast", "centred difference")
        return replace(
            found,
            curves={**found.curves, **dict.fromkeys(keys, curve)},
            changes={**found.changes, **dict.fromkeys(keys, change * found.layers)},
        )

    small = moved(1.0, 0.997)
    assert "patch contrast falls less than 1%" in headline(small)
    assert [tile.after for tile in tiles(small) if tile.title == "contrast"] == ["1.00"]
    negative = moved(-0.001, -0.072)
    assert "patch contrast falls, and" in headline(negative)
    assert any("is −0.001 at the input and −0.072 at layer" in line for line in sentences(negative))
    (tile,) = (tile for tile in tiles(negative) if tile.title == "contrast")
    assert (tile.before, tile.after) == ("0.00", "−0.07")


def test_legends_have_the_names_letter_for_letter(found: CheckupResults) -> None:
    """Also those that matplotlib takes for a formula, or for the name of a line without one."""
    names = ["$..^^$", "_x"]
    two = [replace(found, name=name) for name in names]
    with theme("light") as colours:
        for draw in CURVES.values():
            drawing = draw(two, colours)
            assert drawing is not None
            drawing.figure.savefig(BytesIO())
            (legend,) = drawing.figure.legends
            texts = [text._preprocess_math(text.get_text()) for text in legend.get_texts()]
            assert texts == [(name, False) for name in names]
            assert drawing.key == {names[0]: "first", names[1]: "second"}


def test_which_cka_is_named(found: CheckupResults) -> None:
    plain, debiased = 0.421, 0.687  # far apart, as those of a tiny model need not be
    kinds = {"CKA with input": plain, "debiased CKA with input": debiased}
    assert kinds.keys() <= found.curves.keys()
    told = {name: [Estimate(value)] * found.layers for name, value in kinds.items()}
    found = replace(found, curves={**found.curves, **told})
    (line,) = (line for line in sentences(found) if "CKA" in line)
    assert f"the debiased CKA of all of them {debiased:.3f} (plain {plain:.3f})." in line
    none = [Estimate(math.nan)] * found.layers
    without = replace(found, curves={**found.curves, "debiased CKA with input": none})
    (line,) = (line for line in sentences(without) if "CKA" in line)
    assert line.endswith(f"the plain CKA of all of them {plain:.3f}.")
    for results, value, kind in ((found, debiased, "debiased"), (without, plain, "plain")):
        (tile,) = (tile for tile in tiles(results) if tile.title == "CKA with input")
        assert (tile.after, tile.note) == (f"{value:.2f}", f"1: nothing changed; {kind}")


def test_a_full_disk_leaves_no_half_page(
    found: CheckupResults, reported: Path, fill_disk: Callable[[], None]
) -> None:
    before = {p: p.read_bytes() for p in reported.rglob("*") if p.is_file()}
    fill_disk()
    with pytest.raises(OSError, match="No space left"):
        report(reported, [found])
    assert {p: p.read_bytes() for p in reported.rglob("*") if p.is_file()} == before


def plain(batches: ImageBatches, **changes: Any) -> list[Batch]:
    """Batches of Python users: no places, no objects, no pictures but what is given, as it is or
    as a function of the number of tokens."""

    def known(facts: ImageFacts) -> ImageFacts:
        given = {key: x(len(facts.grid)) if callable(x) else x for key, x in changes.items()}
        return ImageFacts(facts.name, **given)

    return [
        Batch(batch.inputs, tuple(map(known, batch.images)))
        for batch in (batches[i] for i in range(len(batches)))
    ]


def test_without_places_and_labels(batches: ImageBatches, tmp_path: Path) -> None:
    found = checkup(batches._loaded.model, plain(batches), tmp_path, splits=3)
    assert not {"contrast", "image: class"} & found.curves.keys()
    assert math.isfinite(found.curves["CKA with input"][1].value)
    page = report(tmp_path, [found]).read_text()
    assert page.count("<picture>") == 8  # panels: 4 + 4
    assert "cosine to their input" in page


def test_a_model_outside_of_the_table(
    batches: ImageBatches, found: CheckupResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [Batch(batch.inputs, batch.images) for batch in (batches[i] for i in range(len(batches)))]
    model = batches._loaded.model
    monkeypatch.setattr(model.config, "model_type", "vlm_of_tomorrow")
    found_by_itself = checkup(model, few, tmp_path / "found", splits=3)
    assert found_by_itself.curves == found.curves
    mine = Family("Mine", visual_tokens=("image_token_id",))
    again = checkup(model, few, tmp_path / "mine", splits=3, family=mine)
    assert again.curves == found.curves


def test_one_class_has_no_probe(batches: ImageBatches, tmp_path: Path) -> None:
    few = plain(batches, labels={"class": "cat"})
    found = checkup(batches._loaded.model, few, tmp_path, splits=3)
    assert not found.probes
    assert "expected at least 2 classes, got 1" in found.missing["image: class"]


def test_unlabelled_images_are_counted(batches: ImageBatches, tmp_path: Path) -> None:
    few = plain(batches)
    named = [
        replace(few[0], images=tuple(replace(x, labels={"class": "cat"}) for x in few[0].images))
    ]
    found = checkup(batches._loaded.model, named + few[1:], tmp_path, splits=3)
    assert found.notes == (
        "No patch is known to be of an object: masks bring the contrast of patches and, where the "
        "objects have classes, a probe of objects.",
        "Only 5 of 24 images have a label of class: the probe of image: class leaves the others "
        "out.",
    )


def labelled(batches: ImageBatches, labels: list[str]) -> list[Batch]:
    """The images, each with its class."""
    names = iter(labels)
    return [
        replace(
            batch, images=tuple(replace(x, labels={"class": next(names)}) for x in batch.images)
        )
        for batch in plain(batches)
    ]


def test_a_class_of_one_image_is_said(batches: ImageBatches, tmp_path: Path) -> None:
    """No probe has seen it where it is tested: of five of 24 images none is ever right."""
    labels = ["cat", "dog"] * 9 + ["emu", "cat", "yak", "owl", "bee", "ant"]
    found = checkup(batches._loaded.model, labelled(batches, labels), tmp_path, splits=3)
    assert found.notes[-1] == (
        "5 of 24 images are of a class that no other image has: the probe of image: class gets "
        "these wrong."
    )
    assert "image: class" in found.probes


def test_a_class_an_image_has_no_probe(batches: ImageBatches, tmp_path: Path) -> None:
    """It said 0%, without a word."""
    every = labelled(batches, [f"cat {i}" for i in range(24)])
    found = checkup(batches._loaded.model, every, tmp_path, splits=3)
    assert not found.probes
    assert found.missing["image: class"].startswith("each of its 24 classes is that of one image")
    assert len(found.notes) == 1  # of masks


def test_other_numbers_of_tokens_are_not_compared(
    batches: ImageBatches, found: CheckupResults, tmp_path: Path
) -> None:
    """It was a RuntimeError, of shapes, in the maps."""
    bounds = {"size": {"shortest_edge": 16 * 16, "longest_edge": 24 * 24}}
    model = batches._loaded.model
    smaller = pillow("Qwen2VL", **{**QWEN_PROCESSOR, **bounds})
    again = ImageBatches(replace(batches._loaded, processor=smaller), batches._samples, size=5)
    other = checkup(model, again, tmp_path, name="other", splits=3)
    with pytest.raises(ValueError, match=r"of each image; of dark/01\.png tiny has 20, other 6"):
        report(tmp_path, [found, other])
    assert not (tmp_path / "checkup.html").exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x * math.nan, "features: expected finite values"),
        (lambda x: x[:, 0], r"features: expected shape \(N, D\), got \(24,\)"),
    ],
)
def test_only_labels_can_be_the_reason_for_no_probe(
    found: CheckupResults, monkeypatch: pytest.MonkeyPatch, broken: Any, message: str
) -> None:
    whole = found.measured._layer
    monkeypatch.setattr(found.measured, "_layer", lambda *which: broken(whole(*which)))
    with pytest.raises(ValueError, match=message):
        found.measured.probes(lambda: None)


def test_one_patch_an_object_has_no_structure(batches: ImageBatches, tmp_path: Path) -> None:
    def one(count: int) -> np.ndarray:
        return np.where(np.arange(count) == 3, 1, -1)

    found = checkup(batches._loaded.model, plain(batches, objects=one), tmp_path, splits=3)
    assert "contrast" not in found.curves


def test_facts_that_do_not_fit(batches: ImageBatches, tmp_path: Path) -> None:
    model = batches._loaded.model
    wrong = plain(batches, objects=np.zeros(7, dtype=np.int64))
    with pytest.raises(ValueError, match="expected objects of its 20 visual tokens, got 7"):
        checkup(model, wrong, tmp_path / "a")
    short = [Batch(batches[0].inputs, batches[0].images[:2])]
    with pytest.raises(
        ValueError, match="expected facts of 5 images, the rows of input_ids, got 2"
    ):
        checkup(model, short, tmp_path / "b")
    with pytest.raises(ValueError, match="expected at least one that can be used, got none"):
        checkup(model, [Batch({}, (), (("a", "damaged"),))], tmp_path / "c")
    with pytest.raises(ValueError, match="expected eval mode"):
        checkup(model.train(), batches, tmp_path / "d")
    model.eval()


def test_features_that_are_not_finite_are_named(batches: ImageBatches, tmp_path: Path) -> None:
    model: Any = batches._loaded.model
    norm = model.model.language_model.layers[1].mlp.down_proj.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm[0, 0] = math.inf
    try:
        with pytest.raises(
            ValueError, match=r"dark/01\.png: the features of layer 2 are not finite"
        ):
            checkup(model, batches, tmp_path)
    finally:
        with torch.no_grad():
            norm.copy_(kept)


def test_settings_of_batches_are_in_their_fingerprint(batches: ImageBatches) -> None:
    loaded, images = batches._loaded, batches._samples
    before = batches.fingerprint
    assert ImageBatches(loaded, images, size=5).fingerprint == before
    for settings, what in (({"size": 4}, "batch"), ({"size": 5, "purity": 0.9}, "purity")):
        after = ImageBatches(loaded, images, **settings).fingerprint
        assert {key for key in before if before[key] != after[key]} == {what}
    fewer = ImageBatches(loaded, Subset(images, 7), size=5).fingerprint
    assert {key for key in before if before[key] != fewer[key]} == {"images", "masks", "labels"}


@pytest.mark.parametrize("error", [RuntimeError, IndexError, MemoryError])
def test_a_forward_that_fails_is_one_error(
    batches: ImageBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Such as of a config whose layers are others than those that it selects."""

    def forward(*args: Any, **kwargs: Any) -> None:
        raise error("no such layer")

    model = batches._loaded.model
    monkeypatch.setattr(model.model.visual, "forward", forward)
    message = rf"^dark/01.png to dark/09.png: the model's forward failed: {error.__name__}: no such"
    with pytest.raises(ValueError, match=message):
        checkup(model, batches, tmp_path)
