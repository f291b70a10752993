# SPDX-License-Identifier: Apache-2.0
"""Anchors on a tiny LLaVA: a function's rows, and those that do not fit the visual tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from prereg_kernels import PReConfig, apply_pre
from prereg_kernels.attach.anchors import anchor_width, projector_rows
from prereg_kernels.attach.families import FAMILIES
from prereg_kernels.attach.family import Family
from tests.attach.families.test_family import PLAIN, plain_batch, plain_model
from tests.attached import both, compare
from tests.tiny import IMAGE_TOKEN, PATCHES, WIDTH, make_batch, tiny_llava

LLAVA = FAMILIES[0]


@pytest.mark.parametrize(
    "answer, exception, message",
    (
        (torch.zeros(7, 6), ValueError, r"of shape \(8, 6\), got \(7, 6\)"),
        (torch.zeros(8, 5), ValueError, r"of shape \(8, 6\), got \(8, 5\)"),
        (torch.zeros(2, 4, 6), ValueError, r"of shape \(8, 6\), got \(2, 4, 6\)"),
        (None, TypeError, "to return a Tensor, got None"),
        (torch.zeros(8, 6, dtype=torch.long), TypeError, r"floating numbers, got torch\.int64"),
        (torch.zeros(8, 6, device="meta"), ValueError, "on cpu, as the batch, got meta"),
        (torch.zeros(8, 6).log(), ValueError, "NaN or infinity in 8 of 8 rows"),
    ),
)
def test_what_a_function_returns(answer: Any, exception: type[Exception], message: str) -> None:
    model = tiny_llava()
    apply_pre(model, anchor=lambda inputs: answer, anchor_features=6)
    with pytest.raises(exception, match=f"anchor: expected .*{message}"):
        model(**make_batch())


def test_numbers_are_checked_in_the_first_pass_alone() -> None:
    """The first that has any: a batch of text alone shows none."""
    nan, fine = torch.full((8, 6), torch.nan), torch.ones(8, 6)
    answers = [torch.zeros(0, 6), nan, fine, nan]
    model = tiny_llava()
    apply_pre(model, anchor=lambda inputs: answers.pop(0), anchor_features=6)
    model(**make_batch((0, 0))).loss.backward()
    with pytest.raises(ValueError, match="NaN or infinity"):
        model(**make_batch())
    for _ in range(2):
        model(**make_batch()).loss.backward()
    assert not answers


def test_a_function_may_call_the_model_and_runs_without_grad() -> None:
    model = tiny_llava()
    seen = []

    def anchor(inputs: Mapping[str, Any]) -> Tensor:
        seen.append(torch.is_grad_enabled())
        assert len(seen) == 1  # the hooks of its parts do not take these calls for the pass's own
        out = model.model(**{name: inputs[name] for name in ("input_ids", "pixel_values")})
        return out.last_hidden_state[inputs["input_ids"] == IMAGE_TOKEN]

    pre = apply_pre(model, anchor=anchor, anchor_features=WIDTH)
    model(**make_batch()).loss.backward()
    assert seen == [False] and pre.metrics()["pre_loss"] != 0


@pytest.mark.parametrize("rows", ("tokens", "images"))
def test_a_function_may_give_a_row_for_each_image(rows: str) -> None:
    """With level="global": of it, or of its visual tokens, whose mean is taken."""
    per_image = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    of_token = per_image.repeat_interleave(PATCHES, dim=0)
    ours, expected, _, _ = both(
        make_batch((1, 2)), level="global", images=[PATCHES] * 3, anchor_features=6,
        anchor=lambda inputs: per_image if rows == "images" else of_token,
        anchor_rows=lambda model, inputs: of_token,
    )  # fmt: skip
    compare(ours, expected)


@pytest.mark.parametrize("fraction", (1.0, 0.5))
def test_the_anchor_follows_its_token(fraction: float) -> None:
    """With a fraction, too: the anchor is the token's own state, plus its position."""
    model = tiny_llava()
    given: dict[str, Any] = {}

    def anchor(inputs: Mapping[str, Any]) -> Tensor:
        where = (inputs["input_ids"] == IMAGE_TOKEN).flatten().nonzero()
        return where.float().expand(-1, 3)

    pre = apply_pre(model, anchor=anchor, anchor_features=3, token_fraction=fraction)
    pre.heads[2].register_forward_pre_hook(
        lambda head, args, kwargs: given.update(kwargs, anchor=args[1]), with_kwargs=True
    )
    model(**make_batch((1, 0, 2)))
    assert len(given["visual_index"]) == round(12 * fraction)
    assert given["anchor"][:, 0].long().tolist() == given["visual_index"].tolist()


# anchor="pre_projector"


def test_without_a_row_for_each_visual_token() -> None:
    """As where the features were made elsewhere."""
    model, batch = tiny_llava(), make_batch()
    apply_pre(model, anchor="pre_projector")
    features = model.model.get_image_features(batch["pixel_values"])
    features = getattr(features, "pooler_output", features)  # transformers 4.57 returns a list
    batch["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    batch["inputs_embeds"][batch["input_ids"] == IMAGE_TOKEN] = torch.cat(list(features))
    del batch["pixel_values"]
    model.model.forward = _without_ids(model.model.forward)
    message = r"anchor: 'pre_projector' .* run 'model\.multi_modal_projector', .* its 8 visual"
    with pytest.raises(ValueError, match=message):
        model(**batch)


def _without_ids(forward: Any) -> Any:
    """transformers takes ids or embeddings, not both; PRe needs the ids."""
    return lambda *args, **kwargs: forward(*args, **kwargs | {"input_ids": None})


def rows(
    parts: list[Tensor],
    tokens: int,
    width: int = 3,
    kinds: str = "",
    hidden: str = "",
    is_listed: bool = True,
    **family: Any,
) -> Tensor:
    """`projector_rows` of a batch whose visual tokens are of these kinds, and hidden where "x"."""
    names = sorted({*kinds} - {" "})
    of_kind = [torch.tensor([k == name for k in kinds]) for name in names]
    keep = torch.tensor([h != "x" for h in hidden], dtype=torch.bool)
    places = family.pop("places", None)
    return projector_rows(
        parts, tokens, width, dataclasses.replace(LLAVA, **family), torch.zeros(1),
        shown=lambda rows: rows[keep] if hidden else rows, kinds=lambda: of_kind,
        has_both=len(names) > 1, is_listed=is_listed, places=places,
    )  # fmt: skip


def test_rows_of_several_calls_follow_each_other() -> None:
    parts = [torch.zeros(1, 2, 3), torch.ones(2, 3)]
    assert rows(parts, 4)[:, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"shape \(5, 3\), got \(4, 3\)"):
        rows(parts, 5)


def test_rows_of_a_call_for_each_kind() -> None:
    """Each is where a token of its kind is, hidden or not; images (a) come before videos (b)."""
    parts = [torch.tensor([[1.0], [2.0]]), torch.tensor([[7.0], [8.0], [9.0]])]
    assert rows(parts, 5, 1, "babba").flatten().tolist() == [7, 1, 8, 9, 2]
    assert rows(parts, 3, 1, "babba", "..xx.").flatten().tolist() == [7, 1, 2]
    assert rows(parts, 5, 1, "aaaaa").flatten().tolist() == [1, 2, 7, 8, 9]
    with pytest.raises(
        ValueError, match=r"images and videos, of \[3, 2\] rows, got calls of \[2, 3\]"
    ):
        rows(parts, 5, 1, "aabab")
    with pytest.raises(ValueError, match=r"of \[1, 3, 1\] rows, got calls of \[2, 3\] rows"):
        rows(parts, 5, 1, "abcbb")
    with pytest.raises(ValueError, match=r"of \[2, 3\] rows, got calls of \[2, 3\] rows"):
        rows(parts, 6, 1, "aabbb ")  # a position that a mask marks, and that has another id


def test_rows_of_one_call_for_both_kinds() -> None:
    """As ms-swift encodes those of listed families, images first."""
    part = torch.tensor([[1.0], [2.0], [7.0], [8.0], [9.0]])
    assert rows([part], 5, 1, "babba").flatten().tolist() == [7, 1, 8, 9, 2]
    assert rows([part], 3, 1, "babba", "..xx.").flatten().tolist() == [7, 1, 2]
    with pytest.raises(ValueError, match=r"of \[2, 3\] rows, got calls of \[5\] rows"):
        rows([part], 5, 1, "babba", is_listed=False)


def test_rows_that_are_joined() -> None:
    """Those that follow each other. An anchor that is no whole number of them has no rows."""
    part = torch.arange(8.0).reshape(1, 4, 2)
    assert rows([part], 2, 4, joins_rows=True).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"shape \(2, 4\), got \(4, 2\)"):
        rows([part], 2, 4)
    with pytest.raises(ValueError, match=r"shape \(3, 4\), got \(2, 4\)"):
        rows([part], 3, 4, joins_rows=True)
    three = torch.zeros(4, 3)  # six of its numbers are two rows, and four are none
    with pytest.raises(ValueError, match=r"shape \(3, 4\), got \(4, 3\)"):
        rows([three], 3, 4, joins_rows=True)


def test_rows_of_another_order() -> None:
    parts = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
    place = torch.tensor([2, 0, 1])
    assert rows(parts, 3, 1, places=lambda: place).flatten().tolist() == [2, 3, 1]
    with pytest.raises(ValueError, match=r"places: expected a place for each of 3 rows, got 2"):
        rows(parts, 3, 1, places=lambda: place[:2])


@pytest.mark.parametrize(
    "projector, width",
    (
        (nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 9)), 7),
        (nn.ModuleDict({"inner": nn.Linear(5, 9)}), 5),
        (nn.Sequential(Gemma3RMSNorm(6), nn.Linear(6, 9)), 6),
    ),
)
def test_the_width_of_a_projector(projector: nn.Module, width: int) -> None:
    model = nn.ModuleDict({"projector": projector})
    family = Family("Mine", projector="projector")
    config = PReConfig(anchor="pre_projector")
    assert anchor_width(config, family, model) == width
    assert anchor_width(config.replace(anchor_features=3), family, model) == 3
    model["projector"] = nn.Identity()
    with pytest.raises(ValueError, match="anchor_features: expected the width of what enters 'pro"):
        anchor_width(config, family, model)


def test_a_projector_outside_of_the_table() -> None:
    family = Family(**vars(PLAIN) | {"projector": "pixels"})
    batch = plain_batch()
    ours, expected, _, _ = both(
        batch, make=plain_model, mask=batch["input_ids"] == 9, family=family,
        anchor="pre_projector", anchor_rows=lambda model, inputs: inputs["pixels"],
    )  # fmt: skip
    compare(ours, expected)
    assert ours["pre_heads.2.weight_1"].shape == (5, 32)
    with pytest.raises(ValueError, match="but Plain was given no projector; expected 'pre_llm'"):
        apply_pre(plain_model(), family=PLAIN, anchor="pre_projector")


# Settings


@pytest.mark.parametrize(
    "settings, exception, message",
    (
        ({"anchor": "dinov2"}, ValueError, "anchor: expected one of pre_llm, pre_projector, a f"),
        ({"anchor": len}, ValueError, "anchor_features: expected the width A of the anchor f"),
        ({"anchor_features": 8}, ValueError, "anchor_features: expected None with anchor='pre_l"),
        ({"anchor": len, "anchor_features": 0}, ValueError, "anchor_features: .* got 0"),
        ({"level": "object"}, ValueError, "level: expected one of patch, global; got 'object'"),
        ({"token_fraction": 0}, ValueError, r"token_fraction: .* in \(0, 1\], got 0"),
        ({"token_fraction": 1.5}, ValueError, r"token_fraction: .* got 1\.5"),
        ({"token_fraction": "half"}, ValueError, "token_fraction: .* got 'half'"),
        ({"token_fraction": 0.5, "level": "global"}, ValueError, "token_fraction: expected 1 with"),
        ({"share_head": 1}, TypeError, "share_head: expected True or False, got 1"),
        ({"seed": -1}, ValueError, "seed: expected an integer of at least 0, got -1"),
    ),
)  # fmt: skip
def test_settings(settings: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        PReConfig(**settings)


@pytest.mark.parametrize(
    "fields, exception, message",
    (
        ({"places": (1, 0)}, TypeError, r"places: expected a function or None, got \(1, 0\)"),
        ({"projector": 3}, TypeError, "projector: expected the path of a submodule or None, got 3"),
        ({"images": "tiles"}, ValueError, "images: expected 'runs', 'equal' or None, got 'tiles'"),
        ({"counted_by": "pixels"}, TypeError, "counted_by: expected a tuple of names"),
        ({"images": "equal"}, ValueError, "counted_by: images='equal' needs the arguments"),
    ),
)
def test_fields_of_a_family(
    fields: dict[str, Any], exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=message):
        Family("Mine", **fields)
