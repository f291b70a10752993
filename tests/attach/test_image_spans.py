# SPDX-License-Identifier: Apache-2.0
"""Which visual token belongs to which image: hand-worked batches, and those that do not say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from prereg_kernels import apply_pre
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.image_spans import count_images, find_images
from tests.attached import both, compare
from tests.tiny import PATCHES, gradients, make_batch, tiny_llava

A, B, T = 8, 9, 1  # two visual tokens, and text
RUNS = Family("Runs", images="runs")
COUNTED = Family("Counted runs", images="runs", counted_by=("sizes", "videos"))
CUT = Family("Cut", images="runs", counted_by=("sizes",), cut_by=("grids",))
EQUAL = Family("Equal", images="equal", counted_by=("pixels",))


def find(family: Family, ids: Any, **batch: Any) -> tuple[list[int], int]:
    ids = torch.tensor(ids)
    visual = ids > T
    index = visual.flatten().nonzero().squeeze(1)
    images = find_images(family, batch, ids, visual, index)
    counted = count_images(family, batch, ids, visual, visual)
    assert counted.item() == images.count and counted.dtype == torch.int64
    return images.of_token.tolist(), images.count


@pytest.mark.parametrize(
    "ids, of_token",
    (
        ([[T, A, A, T, A]], [0, 0, 1]),
        ([[A, A, A], [A, T, A]], [0, 0, 0, 1, 2]),  # the border of a row ends an image
        ([[A, A, B, B, A]], [0, 0, 1, 1, 2]),  # so does a token of another kind
        ([[T, T], [T, A]], [0]),
        ([[T, T]], []),
    ),
)
def test_runs(ids: Any, of_token: list[int]) -> None:
    assert find(RUNS, ids) == (of_token, len(set(of_token)))


def test_runs_that_the_batch_counts() -> None:
    ids, three = [[A, T, A, A, T, B]], torch.zeros(2, 2)
    assert find(COUNTED, ids, sizes=three, videos=torch.zeros(1, 5)) == ([0, 1, 1, 2], 3)
    assert find(COUNTED, ids) == ([0, 1, 1, 2], 3)
    with pytest.raises(ValueError, match=r"level: 'global' .* 3 runs of them for 2 images \(sizes"):
        find(COUNTED, ids, sizes=three)


def test_videos_that_are_cut_into_runs() -> None:
    ids = [[A, T, B, T, B, T, A, T, B]]
    two, grids = torch.zeros(2, 2), torch.tensor([[2, 4], [1, 6]])
    assert find(CUT, ids, sizes=two, grids=grids) == ([0, 1, 2, 3, 4], 5)
    assert find(CUT, [[B, T, B, T, B, B]], grids=grids) == ([0, 1, 2, 2], 3)
    with pytest.raises(ValueError, match=r"5 runs of them for 3 images \(sizes and grids\)"):
        find(CUT, ids, sizes=torch.zeros(0, 2), grids=grids)
    with pytest.raises(ValueError, match="1 runs of them for 2 images"):
        find(CUT, [[T, A, A, T]], sizes=two)


def test_images_of_equal_size() -> None:
    ids = [[A, A, A, A, T], [T, A, A, T, T]]
    assert find(EQUAL, ids, pixels=torch.zeros(3, 7)) == ([0, 0, 1, 1, 2, 2], 3)
    assert find(EQUAL, ids, pixels=torch.zeros(2, 7)) == ([0, 0, 0, 1, 1, 1], 2)
    assert find(EQUAL, [[T, T]]) == ([], 0)


@pytest.mark.parametrize(
    "batch, message",
    (
        ({"pixels": torch.zeros(4, 7)}, r"6 visual tokens for 4 images \(pixels\)"),
        ({}, r"6 visual tokens for no images \(pixels\)"),
        ({"pixels": torch.zeros(3, 7), "image_sizes": torch.zeros(3, 2)}, "image_sizes given"),
    ),
)
def test_images_that_are_not_of_equal_size(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"level: 'global' needs images of equally .*{message}"):
        find(EQUAL, [[A, A, A, A, T], [T, A, A, T, T]], **batch)


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("loss", ("cosine", "mse"))
def test_images_side_by_side(checkpointing: bool, loss: str) -> None:
    """LLaVA's, which need no token in between."""
    ours, expected, metrics, (_, term) = both(
        make_batch((2, 1, 0)), checkpointing=checkpointing, level="global", images=[PATCHES] * 3,
        loss=loss,
    )  # fmt: skip
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4)
    assert metrics["images"] == 3


def test_a_failed_forward_and_a_dropped_one_leave_the_model_usable() -> None:
    model, batch = tiny_llava(), make_batch((2, 1))
    pre = apply_pre(model, level="global")
    model(**batch).loss.backward()
    expected = pre.metrics()
    with pytest.raises(ValueError):
        model(**batch | {"pixel_values": batch["pixel_values"][:1]})
    model(**batch)
    model(**batch).loss.backward()
    assert pre.metrics() == expected


def test_evaluation() -> None:
    model, batch = tiny_llava(), make_batch((2, 1))
    pre = apply_pre(model, level="global", value_in_eval=True)
    model(**batch).loss.backward()
    expected = pre.metrics()
    model.eval()(**batch)
    assert pre.metrics() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "batch",
    (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])},
        {"position_ids": torch.tensor([[0, 1, 1, 0, 0, 1, 2]])},  # an image's are all the same
        {"position_ids": torch.tensor([[0, 1, 1, 0, 0, 1, 2]]).expand(3, 1, 7)},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32)},
    ),
)
def test_images_of_packed_sequences_that_meet(batch: dict[str, Any]) -> None:
    ids = [[T, A, A, A, A, T, A]]
    assert find(COUNTED, ids, sizes=torch.zeros(3, 2), **batch) == ([0, 0, 1, 1, 2], 3)
    # Positions of another length say nothing, as those of a part of the sequence
    short = {name: x[..., :2] for name, x in batch.items() if name != "cu_seq_lens_q"}
    assert find(RUNS, ids, **short) == ([0, 0, 0, 0, 1], 2)


def packed_rows() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two rows, an image at the end of the first and at the start of the second; and both in one,
    as transformers' collator packs them for flash-attention."""
    whole = make_batch((1, 1))
    ids, labels = whole["input_ids"], whole["labels"]
    ids[0], labels[0] = ids[0].roll(-PATCHES), labels[0].roll(-PATCHES)
    labels[:, 0] = -100  # which nothing before it predicts
    rows = [
        {"input_ids": i.tolist(), "labels": x.tolist()} for i, x in zip(ids, labels, strict=True)
    ]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return whole, collator(rows) | {"pixel_values": whole["pixel_values"], "use_cache": False}


@pytest.mark.parametrize("level", ("patch", "global"))
@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_gradients_of_packed_rows(level: str, attention: str) -> None:
    """Those of the definition, and of the rows apart, of the batch of one row."""

    def make() -> Any:
        model = tiny_llava()
        model.set_attn_implementation(attention)
        return model

    whole, packed = packed_rows()
    assert packed["input_ids"].shape == (1, whole["input_ids"].numel())
    packed.pop("seq_idx")  # for models with a state; llava's attention takes no notice
    settings: dict[str, Any] = {
        "level": level,
        "family": Family("LLaVA in runs", images="runs", counted_by=("pixel_values",)),
    }
    images = [PATCHES] * 2 if level == "global" else None
    ours, expected, metrics, (_, term) = both(packed, make=make, images=images, **settings)
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4)
    model = make()
    apply_pre(model, **settings)
    model(**whole).loss.backward()
    compare(gradients(model), expected)
