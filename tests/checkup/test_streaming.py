# SPDX-License-Identifier: Apache-2.0
"""What all measures of tensors keep: batches, dtypes, autocast, bad values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prereg_kernels.checkup import (
    LensSums,
    MeanSums,
    NormSums,
    SimilaritySums,
    SpectrumSums,
    StructureSums,
    logit_lens,
    patch_structure,
    similarity,
    spectrum,
    token_norms,
)
from prereg_kernels.checkup.measures import scatter_matrix, tensors

COLUMNS = 24
IMAGES = (5, 1, 30, 7, 57)  # patches of each
OBJECTS = torch.arange(100) % 4 - 1
IDS = torch.repeat_interleave(torch.tensor(IMAGES))
VOCABULARY = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(9))

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # features, reference, objects, images


def features(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """100 tokens far from 0, a few of them of massive activations, and of the reference."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(100, COLUMNS, generator=generator) + 2
    x = 0.3 * reference + torch.randn(100, COLUMNS, generator=generator)
    x[17::9, 3] = 4000.0
    return x.to(dtype), reference.to(dtype)


def split(x: Tensor, reference: Tensor, sizes: Sequence[int]) -> list[Batch]:
    return list(
        zip(x.split(sizes), reference.split(sizes), OBJECTS.split(sizes), IDS.split(sizes),
            strict=True)
    )  # fmt: skip


def structure_of(batches: list[Batch]) -> Any:
    sums = StructureSums(mean_of(batches, 0))
    for x, _, objects, images in batches:
        sums.update(x, objects, images)
    return sums.result()


def spectrum_of(batches: list[Batch], which: int = 0) -> SpectrumSums:
    sums = SpectrumSums()
    for batch in batches:
        sums.update(batch[which])
    return sums


def similarity_of(batches: list[Batch]) -> Any:
    sums = SimilaritySums((mean_of(batches, 0), mean_of(batches, 1)))
    for x, reference, _, _ in batches:
        sums.update(x, reference)
    return sums.result(spectrum_of(batches), spectrum_of(batches, 1))


def norms_of(batches: list[Batch]) -> Any:
    sums = NormSums()
    for batch in batches:
        sums.update(batch[0])
    return sums.result()


def lens_of(batches: list[Batch]) -> Any:
    sums = LensSums(nn.Identity(), VOCABULARY)
    for batch in batches:
        sums.update(batch[0])
    return sums.result()


def mean_of(batches: list[Batch], which: int) -> Tensor:
    sums = MeanSums()
    for batch in batches:
        sums.update(batch[which])
    return sums.result()


MEASURES: dict[str, tuple[Callable[[list[Batch]], Any], Callable[[Tensor, Tensor], Any]]] = {
    "structure": (structure_of, lambda x, _: patch_structure(x, OBJECTS, IDS)),
    "spectrum": (lambda b: spectrum_of(b).result(), lambda x, _: spectrum(x)),
    "similarity": (similarity_of, similarity),
    "norms": (norms_of, lambda x, _: token_norms(x)),
    "lens": (lens_of, lambda x, _: logit_lens(x, nn.Identity(), VOCABULARY)),
}
each_measure = pytest.mark.parametrize("name", MEASURES)


def numbers(result: Any) -> list[float]:
    """All numbers of a result, in order."""
    if isinstance(result, tuple):
        return [number for part in result for number in numbers(part)]
    return [result]


@each_measure
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-6)], ids=["64", "32"]
)
@pytest.mark.parametrize(
    "sizes", [IMAGES, (6, 94), (43, 57), (0, 36, 0, 64, 0)], ids=["images", "2", "2'", "empty"]
)
def test_any_batches_of_whole_images_equal_one_shot(
    name: str, sizes: Sequence[int], dtype: torch.dtype, tolerance: float
) -> None:
    x, reference = features(dtype)
    stream, once = MEASURES[name]
    got = numbers(stream(split(x, reference, sizes)))
    assert got == pytest.approx(numbers(once(x, reference)), rel=tolerance)


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "structure"])
def test_rows_one_by_one_equal_one_shot(name: str) -> None:
    x, reference = features()
    stream, once = MEASURES[name]
    got = numbers(stream(split(x, reference, [1] * 100)))
    assert got == pytest.approx(numbers(once(x, reference)), rel=1e-6)


@each_measure
def test_small_pieces_equal_one_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, reference = features()
    once = MEASURES[name][1]
    expected = numbers(once(x, reference))
    monkeypatch.setattr(tensors, "PIECE", 7 * COLUMNS)
    monkeypatch.setattr(scatter_matrix, "ROWS", 33)
    monkeypatch.setattr(scatter_matrix, "STRIP", 5)
    assert numbers(once(x, reference)) == pytest.approx(expected, rel=1e-6)


@each_measure
def test_float32_equals_float64(name: str) -> None:
    x, reference = features()
    once = MEASURES[name][1]
    expected = numbers(once(x.double(), reference.double()))
    assert numbers(once(x, reference)) == pytest.approx(expected, rel=1e-6)


@each_measure
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_measured_in_float32(name: str, dtype: torch.dtype) -> None:
    x, reference = features(dtype)
    once = MEASURES[name][1]
    with torch.autocast("cpu", torch.bfloat16):
        got = numbers(once(x, reference))
    assert got == numbers(once(x.float(), reference.float()))


@each_measure
def test_leaves_its_input_alone_and_takes_any_strides(name: str) -> None:
    x, reference = features()
    once = MEASURES[name][1]
    expected = numbers(once(x, reference))
    wide = torch.stack([x, x], dim=2)[..., 0].requires_grad_()
    assert not wide.is_contiguous()
    assert numbers(once(wide, reference)) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(wide, features()[0])


@each_measure
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_finite(name: str, value: float, dtype: torch.dtype) -> None:
    x, reference = features(dtype)
    x[60, 5] = value
    stream, once = MEASURES[name]
    with pytest.raises(ValueError, match="features: expected finite values, got NaN or infinity"):
        once(x, reference)
    with pytest.raises(ValueError, match="features: expected finite values, got NaN or infinity"):
        stream(split(x, reference, IMAGES))


@each_measure
def test_other_bad_features(name: str) -> None:
    x, reference = features()
    stream, once = MEASURES[name]
    with pytest.raises(ValueError, match=r"features: expected shape \(N, \w+\), got \(24,\)"):
        once(x[0], reference)
    with pytest.raises(ValueError, match=r"features: expected a floating dtype, got torch.int64"):
        once(x.long(), reference)
    with pytest.raises(ValueError, match=r"features: expected magnitudes up to 1e\+15, got 1e\+16"):
        once(x.double().where(x < 1000, 1e16), reference)
    batches = split(x, reference, (6, 94))
    narrow = (batches[1][0][:, :5], *batches[1][1:])
    with pytest.raises(ValueError, match=r"features: expected shape \(N, 24\), got \(94, 5\)"):
        stream([batches[0], narrow])


@pytest.mark.parametrize("sums", [MeanSums, NormSums, SpectrumSums])
def test_nothing_has_come(sums: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"features: expected at least \d rows? in all, got 0"):
        sums().update(torch.ones(0, 3)).result()


def test_the_mean() -> None:
    x, _ = features(torch.bfloat16)
    got = MeanSums().update(x[:3]).update(x[3:]).result()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, x.double().mean(dim=0), rtol=1e-14, atol=0)
