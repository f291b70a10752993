# SPDX-License-Identifier: Apache-2.0
"""On two ranks, one of them without an image: gradients and figures of the whole batch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from prereg_kernels import apply_pre, remove_pre
from tests.attached import compare, eager_term
from tests.helpers import relative_error
from tests.tiny import PATCHES, tiny_llava
from tests.trainers import ranks
from tests.trainers.rows import IMAGES, collate, eager_gradients, make_rows

ERROR_ON_A_RANK = r"visual_tokens: of the \d+ visual positions of the batch .* \d+ enter"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    ranks.run(path)
    return path


@pytest.fixture(scope="module")
def heads() -> Any:
    model = tiny_llava()
    pre = apply_pre(model)
    remove_pre(model)
    return pre.heads


def read(out: Path, case: str) -> list[Any]:
    return [torch.load(out / f"{case} {rank}.pt") for rank in range(ranks.RANKS)]


def cut(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def test_one_rank_has_no_image() -> None:
    assert ["pixel_values" in collate(ranks.rows_of(rank)) for rank in range(2)] == [True, False]


@pytest.mark.parametrize("case", ("trainer", "trainer, checkpointing", "ddp loop"))
def test_gradients_are_those_of_the_whole_batch(out: Path, heads: Any, case: str) -> None:
    for ours in read(out, case):
        compare(ours, eager_gradients(heads, make_rows()))


def test_gradients_with_images_on_both_ranks(out: Path, heads: Any) -> None:
    """More on one than on the other."""
    for ours in read(out, "trainer, images on both"):
        compare(ours, eager_gradients(heads, make_rows(ranks.BOTH)))


def test_gradients_of_reentrant_checkpointing(out: Path, heads: Any) -> None:
    """The tower is frozen."""

    def trained(gradients: Any) -> Any:
        return {name: x for name, x in gradients.items() if "vision_tower" not in name}

    expected = trained(eager_gradients(heads, make_rows(ranks.BOTH)))
    for ours in read(out, "trainer, reentrant"):
        compare(trained(ours), expected)


def test_gradients_where_each_rank_counts_its_labels(out: Path, heads: Any) -> None:
    groups = [ranks.rows_of(rank) for rank in range(ranks.RANKS)]
    for ours in read(out, "trainer, labels of each rank"):
        compare(ours, eager_gradients(heads, make_rows(), groups=groups))


def test_gradients_where_trainer_divides_by_the_micro_batches(out: Path, heads: Any) -> None:
    rows = make_rows()
    groups = [rows[start : start + 2] for start in range(0, 8, 2)]
    for ours in read(out, "trainer, divided"):
        compare(ours, eager_gradients(heads, rows, groups=groups))


def test_gradients_where_the_rows_are_not_counted_beforehand(out: Path, heads: Any) -> None:
    """The mean of the micro-batches' means, each over both ranks."""
    rows = make_rows(ranks.BOTH)
    halves = [eager_gradients(heads, half, groups=[half[:2], half[2:]]) for half in cut(rows, 4)]
    expected = {name: (halves[0][name] + x) / 2 for name, x in halves[1].items()}
    for ours in read(out, "trainer, rows not counted"):
        compare(ours, expected)


def test_an_evaluation_is_of_all_ranks(out: Path, heads: Any) -> None:
    with torch.no_grad():
        _, term = eager_term(tiny_llava().eval(), collate(make_rows()), heads)
    for metrics in read(out, "evaluated"):
        assert metrics["eval_pre_loss"] == pytest.approx(term.item(), rel=1e-5)


def test_gradients_of_the_heads_with_label_smoothing(out: Path, heads: Any) -> None:
    expected = eager_gradients(heads, make_rows())
    for ours in read(out, "trainer, label smoothing"):
        for name in (name for name in expected if "pre_heads" in name):
            assert torch.linalg.norm(ours[name] - expected[name]) < 1e-5 * expected[name].norm()


def test_gradients_of_the_plain_trainer_are_of_the_right_size(out: Path, heads: Any) -> None:
    """Off by the difference of shares, not by a factor of ranks or micro-batches."""
    expected = eager_gradients(heads, make_rows())
    for ours in read(out, "plain trainer"):
        for name in (name for name in expected if "pre_heads" in name):
            assert 0.4 < ours[name].norm() / expected[name].norm() < 1.6


def test_gradients_beside_a_loss_of_the_trainer_s_own(out: Path, heads: Any) -> None:
    """Backward adds PRe's, as Trainer has its loss: times the ranks. By hand it is told of."""
    expected = eager_gradients(heads, ranks.ALIKE)
    for by_callback, by_hand, said in read(out, "trainer with a loss of its own"):
        compare(by_callback, expected)
        for name in (name for name in expected if "pre_heads" in name):
            assert relative_error(2 * by_hand[name], expected[name]) < 2e-5
        [message] = said
        assert "the call's share of num_items_in_batch" in message


def test_gradients_of_whole_images_and_one_head(out: Path) -> None:
    model = tiny_llava()
    pre = apply_pre(model, layers=(1, 3), share_head=True)
    remove_pre(model)
    expected = eager_gradients(pre.heads, make_rows(), level="global")
    shared = {name.replace(".3.", "."): x for name, x in expected.items() if "pre_heads.3" in name}
    for ours in read(out, "trainer, whole images, one head"):
        renamed = {name.replace(".shared.", "."): x for name, x in ours.items()}
        compare(renamed, {n: x for n, x in expected.items() if "pre_heads" not in n} | shared)


@pytest.mark.parametrize(
    "case, level",
    (
        ("fsdp loop", "patch"),
        ("fsdp loop, whole images", "global"),
        ("fsdp loop, kept", "patch"),
        ("fsdp loop, head apart", "patch"),
        ("fsdp loop, checkpointing", "patch"),
        ("fsdp loop, checkpointing, head apart", "patch"),
    ),
)
def test_gradients_under_fully_shard(out: Path, heads: Any, case: str, level: str) -> None:
    """Resharded after the forward pass or not, the head in the root's unit or one of its own."""
    expected = eager_gradients(heads, make_rows(), level=level)
    expected = {name: x for name, x in expected.items() if not ranks.vision(name)}
    with torch.no_grad():
        images = [PATCHES] * sum(IMAGES) if level == "global" else None
        lm, term = eager_term(tiny_llava(), collate(make_rows()), heads, images=images)
    for sharded, ours, metrics in read(out, case):
        assert sharded
        compare(ours, expected)
        assert metrics["visual_tokens"] == sum(IMAGES) * PATCHES
        assert metrics["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
        assert metrics["pre_loss"] == pytest.approx(term.item(), rel=1e-5)


def test_one_head_of_several_layers_under_fully_shard(out: Path) -> None:
    """In a unit of its own; with reentrant checkpointing torch reduces a part of its gradients."""
    model = tiny_llava()
    pre = apply_pre(model, layers=(1, 3), share_head=True)
    remove_pre(model)
    expected = eager_gradients(pre.heads, make_rows())
    for sharded, ours, _ in read(out, "fsdp loop, one head apart"):
        assert sharded
        shared = {name: x for name, x in ours.items() if "pre_heads" in name}
        assert len(shared) == 4
        for name, x in shared.items():
            assert relative_error(x, expected[name.replace(".shared.", ".3.")]) < 2e-5
    for said in read(out, "fsdp loop, one head apart, reentrant"):
        assert said.startswith("share_head: reentrant checkpointing and fully_shard")


def test_gradients_under_fully_shard_in_mixed_precision(out: Path) -> None:
    """bfloat16 parameters, their gradients summed over the ranks in float32."""
    expected = ranks.in_bfloat16()
    assert sum("pre_heads" in name for name in expected) == 4
    for sharded, ours, _ in read(out, "fsdp loop, mixed"):
        assert sharded and all(x.dtype == torch.float32 for x in ours.values())
        compare(ours, expected)


def test_files_of_sharded_heads(out: Path) -> None:
    for expected, found in read(out, "fsdp files"):
        assert len(expected) == 8
        for heads in found:
            assert all(map(torch.equal, heads, expected))


def test_states_of_sharded_models_have_the_training_passes(out: Path) -> None:
    assert read(out, "fsdp states") == [[7, 7, 7, 7]] * ranks.RANKS


def test_figures_are_reduced(out: Path) -> None:
    model, rows = tiny_llava(), make_rows()
    pre = apply_pre(model, layers=(1, 3))
    remove_pre(model)
    with torch.no_grad():
        halves = [eager_term(model, collate(rows[i : i + 4]), pre.heads)[0] for i in (0, 4)]
        _, term = eager_term(model, collate(rows), pre.heads)
    logs = read(out, "figures")
    assert logs[0].items() >= {n: x for n, x in logs[1].items() if "loss" in n}.items()
    assert logs[0]["lm_loss"] == pytest.approx(sum(halves).item() / 2, rel=1e-5)
    assert logs[0]["pre_loss"] == pytest.approx(term.item(), rel=1e-5)


def test_resumed_training_is_uninterrupted_training(out: Path) -> None:
    for whole, again in read(out, "resumed"):
        assert all(torch.equal(again[name], x) for name, x in whole.items())


@pytest.mark.parametrize("way", ("ddp", "fsdp", "fsdp, mixed", "fsdp, mixed layers"))
def test_first_steps_that_are_wrong_raise_where_they_are(out: Path, way: str) -> None:
    """On each rank, or on the one whose batch it is; right ones are silent, before and after."""
    for rank, said in enumerate(read(out, f"checked, {way}")):
        is_error = [bool(re.search(ERROR_ON_A_RANK, text)) for text in said]
        assert is_error == [False, True, rank == 0 and way == "ddp", False]
        assert [bool(text) for text in said] == is_error
