# SPDX-License-Identifier: Apache-2.0
"""The anchor: where it comes from, how wide it is, and what is checked about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.family import Family


def anchor_width(config: PReConfig, family: Family, model: Any) -> int:
    """A, the width of the anchor.

    Raises:
        ValueError: the family has no "pre_projector" anchor, or its width cannot be found.
    """
    if config.anchor == "pre_projector":
        projector = family.projector_of(model)
        return config.anchor_features or _input_width(family, projector)
    if config.anchor_features is not None:
        return config.anchor_features
    return llm_width(family.embeddings_of(model))


def llm_width(embeddings: nn.Module) -> int:
    """The width of the LLM's input, from the embedding: under ZeRO-3 its weight has no shape."""
    width = getattr(embeddings, "embedding_dim", None)
    return width if isinstance(width, int) else next(embeddings.parameters()).shape[1]


def _input_width(family: Family, projector: nn.Module) -> int:
    """The width that its first norm or matrix takes: a projector begins with one of them.

    One that joins rows may have a norm of each row by itself before the matrix of all of them.
    """
    for module in projector.modules():
        features = getattr(module, "in_features", None)
        if isinstance(features, int):
            return features
        if not family.joins_rows and (width := _norm_width(module)):
            return width
    raise ValueError(
        f"anchor_features: expected the width of what enters {family.projector!r}, as no module "
        "there says it; got None"
    )


def _norm_width(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    # Of an RMSNorm of transformers; under ZeRO-3 its weight has no shape
    shape: Any = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    shape = getattr(module, "normalized_shape", shape)
    return int(shape[-1]) if len(shape) == 1 else None


def projector_rows(
    seen: list[Tensor],
    tokens: int,
    width: int,
    family: Family,
    like: Tensor,
    shown: Callable[[Tensor], Tensor],
    kinds: Callable[[], list[Tensor]],
    has_both: bool,
    is_listed: bool,
    places: Callable[[], Tensor] | None = None,
) -> Tensor:
    """The projector's inputs, (N, A): a row for each visual token, in their order.

    Args:
        seen: the projector's inputs in the order of its calls, (..., A) each. If it joins rows,
            their last axis is a part of A.
        tokens: N.
        like: gives the dtype and device of the result if there are no visual tokens.
        shown: removes the rows of tokens that attention hides.
        kinds: gives, for each id of visual tokens that the batch has, where among the visual tokens
            it is, such as those of images and those of videos: bool, (tokens, hidden or not,).
        has_both: whether the batch has images and videos.
        is_listed: whether the family is one of the package's, or somebody else's.
        places: gives where among the rows of all calls each one belongs; None: where it is.

    Raises:
        ValueError: there is not one row for each visual token, or the rows' order is not known.
    """
    if not tokens:
        return like.new_zeros(0, width)
    parts = [_rows(x, width, family.joins_rows) for x in seen]
    if not parts:
        raise ValueError(
            f"anchor: 'pre_projector' expected the model's call to run {family.projector!r}, which "
            f"has the rows of its {tokens} visual tokens; it did not. Give the model pixels, not "
            "embeddings or features that are made before, or take 'pre_llm' or a function"
        )
    rows = torch.cat(parts) if len(parts) > 1 else parts[0]  # `cat` copies a single one, too
    if places is not None:
        rows = _put(rows, places())
    if (len(parts) > 1 or has_both) and len(of_kind := kinds()) > 1:  # a sync
        rows = _merge(rows, [len(part) for part in parts], of_kind, family, is_listed)
    rows = shown(rows)
    if tuple(rows.shape) != (tokens, width):
        raise ValueError(
            "anchor: 'pre_projector' expected a row of the vision encoder for each visual token, "
            f"shape {(tokens, width)}, got {tuple(rows.shape)} at {family.projector!r}"
        )
    return rows


def _rows(x: Tensor, width: int, joins: bool) -> Tensor:
    """(rows, A), or as they come if they cannot be joined: then they are not as many as tokens."""
    can_join = joins and width % x.shape[-1] == 0 and x.numel() % width == 0
    return x.reshape(-1, width if can_join else x.shape[-1])


def _put(rows: Tensor, places: Tensor) -> Tensor:
    """The rows, each at its place.

    Raises:
        ValueError: there is not a place for each.
    """
    if len(places) != len(rows):
        raise ValueError(
            f"family.places: expected a place for each of {len(rows)} rows, got {len(places)}"
        )
    return torch.empty_like(rows).index_copy_(0, places.to(rows.device), rows)


def _merge(
    rows: Tensor, calls: list[int], kinds: list[Tensor], family: Family, is_listed: bool
) -> Tensor:
    """The rows of one call for each kind of visual token, each where tokens of its kind are.

    ms-swift encodes images and videos of listed families by one call, images first. Of another
    family's one call nobody knows the order.

    Raises:
        ValueError: the calls have other numbers of rows than the kinds have tokens.
    """
    expected = [int(kind.sum()) for kind in kinds]
    if is_listed and calls == [sum(expected)]:
        calls = expected
    if calls != expected or len(kinds[0]) != len(rows):  # some of another id, in a given mask
        raise ValueError(
            f"anchor: 'pre_projector' expected a call of {family.projector!r} for each kind of "
            f"visual token, images and videos, of {expected} rows, got calls of {calls} rows; "
            "expected batches of one kind, 'pre_llm' or a function"
        )
    merged = torch.empty_like(rows)
    for kind, part in zip(kinds, rows.split(calls), strict=True):
        merged[kind.to(rows.device)] = part
    return merged


def function_rows(
    anchor: Any,
    tokens: int,
    images: int | None,
    width: int,
    device: torch.device,
    finite: bool,
    shown: Callable[[Tensor], Tensor],
) -> Tensor:
    """The result of an anchor function, checked.

    Args:
        tokens: N. images: their number, if the anchor may have a row for each; otherwise None.
        device: of the batch.
        finite: also look for NaN and infinity, which is a sync.
        shown: removes the rows of tokens and images that attention hides.

    Raises:
        TypeError: the result is no Tensor, or has no floating-point numbers.
        ValueError: it has another shape or device, or numbers that are not finite.
    """
    if not isinstance(anchor, Tensor):
        raise TypeError(f"anchor: expected the function to return a Tensor, got {anchor!r:.80}")
    if not anchor.is_floating_point():
        raise TypeError(f"anchor: expected floating numbers, got {anchor.dtype}")
    anchor = shown(anchor) if anchor.dim() else anchor
    expected = [(tokens, width)]
    if images is not None and images != tokens:
        expected.append((images, width))
    if tuple(anchor.shape) not in expected:
        shapes = " or ".join(map(str, expected))
        raise ValueError(f"anchor: expected a Tensor of shape {shapes}, got {tuple(anchor.shape)}")
    if anchor.device != device:
        raise ValueError(f"anchor: expected it on {device}, as the batch, got {anchor.device}")
    if finite and not bool(anchor.isfinite().all()):
        rows = int((~anchor.isfinite()).any(dim=1).sum())
        raise ValueError(
            f"anchor: expected finite numbers, got NaN or infinity in {rows} of "
            f"{anchor.shape[0]} rows"
        )
    return anchor
