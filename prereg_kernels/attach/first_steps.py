# SPDX-License-Identifier: Apache-2.0
"""FirstSteps: checks in the first steps that the visual tokens are where the model's family says.

A model puts visual features into its decoder's input in place of rows of its embedding table. So
the rows that differ from the table belong to visual tokens, or to other tokens with features. The
first training step with each set of arguments is compared with what the embedding module returned
in it, with images and without. Later steps of that kind are not compared. In a graph of
torch.compile no step is.

Some models change each row of the table on its way to the decoder, for instance by a norm. Then the
same word has the same row wherever it stands, and the rows of placeholders with features differ.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prereg_kernels._util import private
from prereg_kernels.attach.checkpointing import outside_selection
from prereg_kernels.attach.embedded_rows import differs_from, varies_by_place
from prereg_kernels.attach.families import family_of_type
from prereg_kernels.attach.resolver import resolve
from prereg_kernels.attach.visual import find_marked, hide

if TYPE_CHECKING:
    from prereg_kernels.attach.passes import Pass
    from prereg_kernels.attach.sequence_parallel import Part
    from prereg_kernels.attach.state import State

SEVERAL_ROWS = "The model puts several rows in place of one id"
WHAT_TO_DO = (
    "Where the model expands or splits its sequence, train it with an id for each position, or set "
    "pre.next_visual_mask before each call to a mask of the sequence that the decoder gets, or "
    "pass family=Family(..., visual_mask=function) that makes it from the call's arguments"
)

NO_PIXELS = ("inputs_embeds", "attention", "audio", "input_features", "past_key_values", "cache")


class FirstSteps:
    """The kinds of steps that have been compared already."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._seen: set[tuple[frozenset[str], bool]] = set()

    def begin(self, current: Pass) -> None:
        """Keep what the embedding module returns in this pass, if its kind is new."""
        kind, is_checking = _kind(current), self._state.is_checking
        if kind in self._seen and not is_checking:
            return
        self._state.check_stage()
        embeddings = self._state.family.embeddings_of(self._state.model)
        if not is_checking and self._is_in_graph(embeddings):
            self._seen.add(kind)
            return
        embedded, thread = list[Tensor](), threading.get_ident()

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or threading.get_ident() != thread:
                return
            if isinstance(output, Tensor):
                with outside_selection():  # a copy: some models write features into it
                    embedded.append(output.detach().clone())

        current.embedded = embedded
        current.embedding_hook = embeddings.register_forward_hook(keep)

    def look(self, current: Pass, states: Tensor, is_input: bool) -> None:
        """Compare what enters the decoder with what the embedding module returned.

        Args:
            states: (rows, length, D). is_input: no decoder layer has run yet.

        Raises:
            ValueError: visual positions without features, or a model whose parts were found and
                that nothing can be seen of.
        """
        if current.embedded is None:
            return
        assert current.embedding_hook is not None
        current.embedding_hook.remove()
        embedded, current.embedded = current.embedded, None
        part = current.part
        if part is not None and states.shape[:-1] == part.shape:
            embedded = [part.own(x) if x.shape[:-1] == current.shape else x for x in embedded]
            current = _own(current, part)
        self._compare(current, embedded, states, is_input)

    def end(self, current: Pass, is_whole: bool) -> None:
        """Keep nothing of the pass, and count its kind as compared.

        Args:
            is_whole: no error ended it; a step that is tried again is looked at again.
        """
        if current.embedding_hook is None:
            return
        current.embedding_hook.remove()
        if not is_whole:
            return
        states = current.anchor
        if current.embedded and states is not None and states.shape[:-1] == current.shape:
            # The decoder is compiled, where nothing looks; the anchor is what entered it
            self.look(current, states, not self._state.family.entry_of(self._state.model))
        current.embedded = None
        self._seen.add(_kind(current))

    def _is_in_graph(self, embeddings: nn.Module) -> bool:
        """Whether a compiled part of the model calls them, which would trace a hook with it."""
        family, model = self._state.family, self._state.model
        outside = [model]  # of the calls of these
        if family.entry_of(model) is None:  # others give the decoder what the embeddings return
            outside += [x for x in family.language_model_of(model).modules() if x is not embeddings]
        compiled = [x for x in model.modules() if private.is_compiled(x) and x not in outside]
        return any(embeddings is inner for x in compiled for inner in x.modules())

    def _compare(
        self, current: Pass, embedded: list[Tensor], states: Tensor, is_input: bool
    ) -> None:
        family, visual = self._state.family, _visual(current)
        rows = states[visual.to(states.device)]
        tables = [x.to(states) for x in embedded if x.shape[-1] == states.shape[-1]]
        whole = [x for x in tables if x.shape == states.shape]
        # Those of a batch without images may be rows of padding, which the table has as zeros
        is_padding = any(not x[visual.to(x.device)].count_nonzero() for x in whole)
        is_empty = len(rows) and not rows.count_nonzero() and not is_padding
        if is_empty and not family.starts_at_zero:
            raise ValueError(
                f"anchor: all of the {len(rows)} visual rows that enter {family.language_model!r} "
                "are zero, and so would L_PRe be: the model adds their features later. Expected "
                "family.enters_at, the index of the decoder layer whose input holds them first"
            )
        if not is_input:
            return
        everywhere = torch.ones_like(visual)
        if current.source == "family.visual_mask":  # attention's mask may be of another sequence
            visible = everywhere
        else:
            visible = hide(everywhere, current.inputs.get("attention_mask"))
        in_place = bool(whole)
        words = visible & ~visual & (states.count_nonzero(dim=-1) > 0).to(visual.device)
        differs = differs_from(states, tables).to(visual.device) if tables else None
        if differs is None or bool((differs | ~words).all()):
            ids = current.inputs.get("input_ids")
            differs, in_place = varies_by_place(states, ids, visible, visual), True
            self._compare_with_listed(current, visual, visible)
        if differs is None:
            self._look_for_pixels(rows, current)
            self._refuse_unseen(current, bool((visible & ~visual).any()))
            return
        strange = differs & (visible & ~visual if in_place else words)
        if not in_place and current.source == "input_ids":
            self._refuse_several_rows(strange & ~self._others(current.inputs["input_ids"]))
        self._look_at_visual(visual & ~differs, visual, current)
        self._look_for_pixels(rows, current)
        if in_place:
            self._look_at_words(strange, current)
        else:
            self._look_at_positions(strange, current)
        self._look_at_codes(current)

    def look_before(self, current: Pass, states: Tensor, is_input: bool) -> None:
        """Check that what comes before `family.enters_at` holds no visual features.

        Args:
            states: (rows, length, D). is_input: the `inputs_embeds`, not the first layer's input.

        Raises:
            ValueError: it does, so the anchor would be what layers have made of them.
        """
        if current.embedded is None:
            return
        visual = _visual(current)
        tables = [x.to(states) for x in current.embedded if x.shape == states.shape]
        if not tables:
            return
        differs = differs_from(states, tables).to(visual.device)
        empty = (states.count_nonzero(dim=-1) == 0).to(visual.device)
        rows = states[(visual & differs & ~empty).to(states.device)]
        if len(rows) and not bool((rows == rows[0]).all()):
            family = self._state.family
            raise ValueError(
                "family.enters_at: expected the index of the first decoder layer whose input "
                "holds visual features, or None where the inputs_embeds hold them; got "
                f"{family.entry_of(self._state.model)}, and they are there before: {len(rows)} of "
                f"the {int(visual.sum())} visual rows differ from the embedding table's"
            )
        cleared = hide(differs & empty, current.inputs.get("attention_mask"))
        if is_input and bool(cleared.any()):  # for the features to come
            self._look_at_visual(visual & ~cleared, visual, current)
            self._look_at_words(cleared & ~visual, current)

    def _refuse_unseen(self, current: Pass, has_words: bool) -> None:
        """Raise ValueError if the model's parts were only found, where the table shows nothing."""
        if self._state.is_checking and has_words and self._state.origin != "found":
            warnings.warn(
                "PRe: nothing is seen of where the visual features are, as the model changes each "
                "row of its embedding table before its decoder gets it; the shapes are right",
                stacklevel=2,
            )
        if self._state.origin != "found" or not has_words or not current.index.numel():
            return
        inputs = current.inputs
        if inputs.get("input_ids") is None or inputs.get("inputs_embeds") is not None:
            return
        family = self._state.family
        raise ValueError(
            f"model: PRe found the parts of {type(self._state.model).__name__} by itself, and "
            "cannot see that they are the right ones: its rows of text are not those of its "
            "embedding table. If they are, say so: apply_pre(model, family=Family("
            f"{family.name!r}, language_model={family.language_model!r}, "
            f"layers={family.layers!r}, visual_tokens={family.visual_tokens!r}))"
        )

    def _compare_with_listed(self, current: Pass, visual: Tensor, visible: Tensor) -> None:
        """Compare the caller's family with that of the model's type, if the rows show little."""
        model: Any = self._state.model
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        is_told = self._state.origin != "given" or current.source == "next_visual_mask"
        if is_told or family_of_type(model_type) is None:
            return
        listed = resolve(model).family
        marked = listed.marked(model, current.inputs) & visible
        if not marked.equal(visual):
            warnings.warn(
                f"PRe: {int((marked != visual).sum())} positions of the batch are visual by the "
                f"family of {model_type!r} and not by the one given, {self._state.family.name!r}, "
                "or the other way round; apply_pre(model) without family takes the former",
                stacklevel=2,
            )

    def _look_at_visual(self, plain: Tensor, visual: Tensor, current: Pass) -> None:
        family, codes = self._state.family, self._codes(current)
        if codes is not None and codes.shape == plain.shape:
            plain = plain & ~codes.to(plain.device)  # their features are rows of the table
        count = int(plain.sum())
        if not count:
            return
        source = str(family.visual_tokens) if current.source == "input_ids" else current.source
        message = (
            f"of the {int(visual.sum())} visual positions of the batch ({source}) {count} enter "
            f"{family.language_model!r} as plain rows of the embedding table, without visual "
            "features"
        )
        if current.source == "next_visual_mask":  # the caller's word
            warnings.warn(f"PRe: {message}", stacklevel=2)
            return
        if current.source == "family.visual_mask":
            raise ValueError(
                f"visual_mask: {message}; expected the function to mark the positions of the "
                "decoder's sequence where the model puts them"
            )
        raise ValueError(
            f"visual_tokens: {message}. Either the batch lacks their images, or these are not the "
            "ids that the model replaces, or it shows its images to the decoder in another way; "
            "expected family.visual_tokens to be the ids of image and video placeholders"
        )

    def _look_for_pixels(self, rows: Tensor, current: Pass) -> None:
        """Placeholders without images may have rows that are not those of the table, but one."""
        if len(rows) > 1 and not _has_pixels(current.inputs) and bool((rows == rows[0]).all()):
            warnings.warn(
                f"PRe: all of the {len(rows)} visual rows that enter "
                f"{self._state.family.language_model!r} are the same, and the batch has no "
                "argument that could be their images",
                stacklevel=2,
            )

    def _look_at_words(self, strange: Tensor, current: Pass) -> None:
        family, model = self._state.family, self._state.model
        ids = current.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape != strange.shape:
            self._look_at_positions(strange, current)
            return
        strange = strange & ~self._others(ids).to(strange.device)
        if not bool(strange.any()):
            return
        left_out, counts = ids.to(strange.device)[strange].unique(return_counts=True)
        field = "visual_mask" if family.visual_tokens is None else "visual_tokens"
        named = ", ".join(
            f"{token}{_name(model, token)} x {count}"
            for token, count in zip(left_out.tolist()[:8], counts.tolist(), strict=False)
        )
        warnings.warn(
            f"PRe: {int(strange.sum())} positions of the batch get features and are not counted as "
            f"visual tokens; their ids: {named}. If they are visual, pass "
            f"family=dataclasses.replace(pre.family, {field}=...) with all of them; if not, with "
            "other_tokens=(...)",
            stacklevel=2,
        )

    def _refuse_several_rows(self, strange: Tensor) -> None:
        """Raise ValueError if a model puts features, not marked, between pieces of its text."""
        count = int(strange.sum())
        if count:
            raise ValueError(
                f"input_ids: PRe finds the visual tokens by it, but {count} other positions of the "
                f"decoder's sequence have features. {SEVERAL_ROWS}, and cuts its sequence to the "
                f"length of input_ids. {WHAT_TO_DO}"
            )

    def _look_at_positions(self, strange: Tensor, current: Pass) -> None:
        """Count the other tokens with features, if no ids say what stands at a position."""
        if current.source != "family.visual_mask":
            return
        ids, count = current.inputs.get("input_ids"), int(strange.sum())
        if count > (int(self._others(ids).sum()) if isinstance(ids, Tensor) else 0):
            row, position = strange.nonzero()[0].tolist()
            warnings.warn(
                f"PRe: {count} positions of the decoder's sequence get features and are not in "
                f"family.visual_mask, the first of them at position {position} of row {row}. If "
                "they are visual, mark them; if not, name their ids in family.other_tokens",
                stacklevel=2,
            )

    def _others(self, ids: Tensor) -> Tensor:
        """Tokens that get features and are not visual: bool, the shape of `ids`."""
        return find_marked(ids, self._state.family.other_token_ids(self._state.model))

    def _look_at_codes(self, current: Pass) -> None:
        codes = self._codes(current)
        if codes is None or current.source != "input_ids":
            return
        count = int(codes.sum())
        if count:
            warnings.warn(
                f"PRe: {count} ids of the batch are codes of pictures, which are not counted as "
                "visual tokens; set pre.next_visual_mask before each call to regularise them",
                stacklevel=2,
            )

    def _codes(self, current: Pass) -> Tensor | None:
        """Which ids of the batch are codes of pictures: bool, in their shape."""
        codes, ids = self._state.family.codes, current.inputs.get("input_ids")
        if codes is None or not isinstance(ids, Tensor):
            return None
        return torch.isin(ids, ids.new_tensor(codes(self._state.model.config)))


def _kind(current: Pass) -> tuple[frozenset[str], bool]:
    """The kind of a step: which arguments it has, and whether it has a visual token."""
    given = frozenset(name for name, value in current.inputs.items() if value is not None)
    return given, bool(current.index.numel())


def _own(current: Pass, part: Part) -> Pass:
    """The pass, reduced to this rank's part of its sequences."""
    inputs, ids = dict(current.inputs), current.inputs.get("input_ids")
    everywhere = torch.ones(current.shape, dtype=torch.bool, device=part.numbers.device)
    if current.source != "family.visual_mask":  # attention's mask may be of another sequence
        everywhere = hide(everywhere, inputs.get("attention_mask"))
    inputs["attention_mask"] = part.own(everywhere) & (part.numbers >= 0)
    is_whole = isinstance(ids, Tensor) and ids.shape == current.shape
    inputs["input_ids"] = part.own(ids) if is_whole and ids is not None else None
    return replace(current, shape=part.shape, index=part.index, inputs=inputs, part=None)


def _visual(current: Pass) -> Tensor:
    """The visual positions that attention shows: bool, (rows, length)."""
    visual = torch.zeros(current.shape, dtype=torch.bool, device=current.index.device)
    visual.view(-1)[current.index] = True
    return visual


def _has_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether an argument may be images: an array of numbers, neither text nor sound."""
    arrays = (x for name, x in inputs.items() if not any(word in name for word in NO_PIXELS))
    return any(
        isinstance(x, (list, tuple)) or (isinstance(x, Tensor) and x.is_floating_point())
        for x in arrays
    )


def _name(model: Any, token: int) -> str:
    """The name of an id in the model's config, in brackets; "" if it has none."""
    config: Any = getattr(model, "config", None)
    values: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    names = [name for name, value in values.items() if type(value) is int and value == token]
    names = [name for name in names if "token" in name]
    return f" ({names[0]})" if names else ""
