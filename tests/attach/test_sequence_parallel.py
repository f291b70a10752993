# SPDX-License-Identifier: Apache-2.0
"""SequenceParallel: which part of the rows a rank has, and what it says of the wrong ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from prereg_kernels import SequenceParallel, apply_pre
from tests.attached import both, compare
from tests.tiny import PATCHES, gradients, make_batch, tiny_llava


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def rank_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this the rank of so many, for what asks which it is and nothing more."""

    def become(rank: int, size: int) -> None:
        monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: size)

    return become


@pytest.mark.parametrize(
    "shard, parts",
    (
        ("contiguous", [[[0, 1, 2], [5, 6, 7]], [[3, 4, -1], [8, 9, -1]]]),
        ("zigzag", [[[0, 1, -1, -1], [5, 6, -1, -1]], [[2, 3, 4, -1], [7, 8, 9, -1]]]),
        (lambda x: x[:, 1::2], [[[1, 3], [6, 8]]] * 2),
        (lambda x: torch.nn.functional.pad(x[:, :1], (1, 0)), [[[-1, 0], [-1, 5]]] * 2),
    ),
)
def test_parts(rank_of: Callable[[int, int], None], shard: Any, parts: Any) -> None:
    """Of two rows of five tokens, of which these are visual."""
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]]).bool()
    visual = [0, 3, 4, 6]
    for rank, expected in enumerate(parts):
        rank_of(rank, 2)
        part = SequenceParallel(None, shard).part_of(mask)
        assert part.numbers.tolist() == expected
        assert tuple(part.shape) == (2, len(expected[0]))
        flat = [number for row in expected for number in row]
        assert part.index.tolist() == [i for i, number in enumerate(flat) if number in visual]
        assert part.place.tolist() == [visual.index(x) for x in flat if x in visual]
        own = part.own(torch.arange(10).view(2, 5) * 10).flatten().tolist()
        assert own == [10 * max(number, 0) for number in flat]


@pytest.mark.parametrize(
    "shard, error, message",
    (
        ("halves", ValueError, "shard: expected 'contiguous', 'zigzag', a function or None, got"),
        (lambda x: x.float(), TypeError, "an int64 Tensor, .* got torch.float32, "),
        (lambda x: [x], TypeError, r"an int64 Tensor, \(rows, length\), got list"),
        (lambda x: x - 2, ValueError, "each position once at most, and 0 where it pads"),
        (lambda x: x[:, :1].expand(-1, 2), ValueError, "or some of them twice"),
        (lambda x: x + 1, ValueError, "got others"),
    ),
)
def test_wrong_parts(shard: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SequenceParallel(None, shard).part_of(torch.ones(2, 3, dtype=torch.bool))


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"gradients: expected one of .* got 'mean'"):
        SequenceParallel(None, gradients="mean")  # type: ignore[arg-type]
    pre = apply_pre(tiny_llava())
    with pytest.raises(TypeError, match="expected a SequenceParallel or None, got str"):
        pre.sequence_parallel = "contiguous"  # type: ignore[assignment]


def cut(model: Any) -> None:
    """The decoder gets the first seven positions."""

    def first(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"][:, :7]
        kwargs["attention_mask"] = kwargs["position_ids"] = None
        return args, kwargs

    model.get_decoder().register_forward_pre_hook(first, with_kwargs=True)


@pytest.mark.parametrize("is_first", (False, True))
def test_a_part_that_nobody_has_told_of(is_first: bool) -> None:
    """Whether PRe sees the embeddings before they are cut or after."""
    model, batch = tiny_llava(), make_batch()
    del batch["labels"]
    if is_first:
        cut(model)
    apply_pre(model)
    if not is_first:
        cut(model)
    with pytest.raises(ValueError, match=r"\(2, 14\).*\(2, 7.*pre\.sequence_parallel = Sequence"):
        model(**batch)


def test_a_part_of_another_shape(one_rank: None) -> None:
    model, batch = tiny_llava(), make_batch()
    cut(model)
    apply_pre(model).sequence_parallel = SequenceParallel(None, lambda x: x[:, :6].contiguous())
    with pytest.raises(ValueError, match=r"rank's part of \(2, 14\), \(2, 6\), .* got .*\(2, 7\)"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])


def test_whole_images_of_parts(one_rank: None) -> None:
    pre = apply_pre(model := tiny_llava(), level="global")
    pre.sequence_parallel = SequenceParallel(None)
    with pytest.raises(ValueError, match=r"level: 'global' needs to know where images are cut"):
        model(**make_batch())


@pytest.mark.parametrize("shard", (None, "contiguous"))
@pytest.mark.parametrize("fraction", (1.0, 0.5))
def test_the_whole_is_a_part(one_rank: None, shard: Any, fraction: float) -> None:
    """In a group of one rank all is as without."""
    found = []
    for shared in (None, SequenceParallel(None, shard)):
        model = tiny_llava()
        pre = apply_pre(model, token_fraction=fraction)
        pre.sequence_parallel = shared
        model(**make_batch()).loss.backward()
        found.append((gradients(model), pre.metrics()))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(x, found[1][0][name]) for name, x in found[0][0].items())


@pytest.mark.parametrize("shard", ("zigzag", pytest.param(None, marks=pytest.mark.compiled)))
def test_compiled(one_rank: None, shard: Any) -> None:
    """A graph goes by a mask of the part. The tower stays out of it, to save time."""
    model, batch = tiny_llava(), make_batch()
    model.model.get_image_features = torch.compiler.disable(model.model.get_image_features)
    pre = apply_pre(model)
    pre.sequence_parallel = SequenceParallel(None, shard)
    torch.compile(model, backend="aot_eager")(**batch).loss.backward()
    _, expected, *_ = both(batch)
    compare(gradients(model), expected)


def test_the_first_steps_look_at_a_part(one_rank: None) -> None:
    """Visual positions that get rows of the table are an error there, too."""
    model, batch = tiny_llava(), make_batch((2, 1))

    def forget(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        words = torch.full_like(batch["input_ids"], 3)
        kwargs["inputs_embeds"] = model.get_input_embeddings()(words)[:, :7]
        kwargs["attention_mask"] = kwargs["position_ids"] = None
        return args, kwargs

    model.get_decoder().register_forward_pre_hook(forget, with_kwargs=True)
    pre = apply_pre(model)
    pre.sequence_parallel = SequenceParallel(None, lambda x: x[:, :7].contiguous())
    count = 7 + PATCHES
    with pytest.raises(ValueError, match=f"of the {count} visual positions .* {count} enter"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])


def test_copies_keep_it_and_pickles_do_not() -> None:
    """A process group belongs to its process."""
    model, shared = tiny_llava(), SequenceParallel(object())
    pre = apply_pre(model)
    pre.sequence_parallel, pre.tensor_parallel_group = shared, (group := object())
    copied = copy.deepcopy(model)._prereg
    assert copied.sequence_parallel is shared and copied.tensor_parallel_group is group
    read = pickle.loads(pickle.dumps(model))._prereg
    assert read.sequence_parallel is None and read.tensor_parallel_group is None


def test_a_tensor_parallel_group_of_one_rank(one_rank: None) -> None:
    found: list[dict[str, Tensor]] = []
    for group in (None, dist.group.WORLD):
        model = tiny_llava()
        apply_pre(model).tensor_parallel_group = group
        model(**make_batch()).loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
