"""What the first steps show: whether the visual tokens are where the model's family says.

A model gets its visual features into its decoder in place of rows of its embedding table. So the
rows that differ from that table are those of the visual tokens, and of other tokens with features.
A training step that brings a new set of arguments is compared with what the embedding module
returned in it, with images and without; later steps of that kind are not. In a graph of
torch.compile nothing is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prereg_kernels.attach.visual import find_marked, find_visible

if TYPE_CHECKING:
    from prereg_kernels.attach.passes import Pass
    from prereg_kernels.attach.state import State


class FirstSteps:
    """Which kinds of steps have been looked at."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._seen: set[tuple[frozenset[str], bool]] = set()

    def begin(self, current: Pass) -> None:
        """Keep what the embedding module returns in this pass, if its kind is new."""
        given = frozenset(name for name, value in current.inputs.items() if value is not None)
        kind = (given, bool(current.index.numel()))
        if kind in self._seen and not self._state.is_checking:
            return
        self._seen.add(kind)
        embedded: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # a copy: some models write features into it
                embedded.append(output.detach().clone())

        current.embedded = embedded
        embeddings = self._state.model.get_input_embeddings()
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
        family, visual = self._state.family, _visual(current)
        rows = states[visual.to(states.device)]
        if len(rows) and not rows.count_nonzero() and not family.starts_at_zero:
            raise ValueError(
                f"anchor: all of the {len(rows)} visual rows that enter {family.language_model!r} "
                "are zero, and so would L_PRe be: the model adds their features later. Expected "
                "family.enters_at, the index of the decoder layer whose input holds them first"
            )
        tables = [x.to(states) for x in current.embedded if x.shape == states.shape]
        current.embedded = None
        if not is_input:
            return
        visible = find_visible(current.inputs.get("attention_mask"), visual)
        visible = torch.ones_like(visual) if visible is None else visible
        differs = _differs(states, tables).to(visual.device) if tables else None
        words = visible & ~visual
        if differs is not None:
            words &= (states.count_nonzero(dim=-1) > 0).to(visual.device)
        if differs is None or bool((differs | ~words).all()):
            self._refuse_unseen(current, bool(words.any()))
            return
        self._look_at_visual(visual & ~differs, visual, current)
        self._look_at_words(differs & visible & ~visual, current)
        self._look_at_codes(current)

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

    def _look_at_visual(self, plain: Tensor, visual: Tensor, current: Pass) -> None:
        family, count = self._state.family, int(plain.sum())
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
        raise ValueError(
            f"visual_tokens: {message}. Either the batch lacks their images, or these are not the "
            "ids that the model replaces, or it shows its images to the decoder in another way; "
            "expected family.visual_tokens to be the ids of image and video placeholders"
        )

    def _look_at_words(self, strange: Tensor, current: Pass) -> None:
        family, model = self._state.family, self._state.model
        ids = current.inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape != strange.shape:
            return
        strange = strange & ~find_marked(ids, family.other_token_ids(model)).to(strange.device)
        if not bool(strange.any()):
            return
        left_out, counts = ids.to(strange.device)[strange].unique(return_counts=True)
        named = ", ".join(
            f"{token}{_name(model, token)} x {count}"
            for token, count in zip(left_out.tolist()[:8], counts.tolist(), strict=False)
        )
        warnings.warn(
            f"PRe: {int(strange.sum())} positions of the batch get features and are not counted as "
            f"visual tokens; their ids: {named}. If they are visual, pass "
            f"family=Family({family.name!r}, visual_tokens=...) with all such ids; if not, with "
            "other_tokens=(...)",
            stacklevel=2,
        )

    def _look_at_codes(self, current: Pass) -> None:
        codes, ids = self._state.family.codes, current.inputs.get("input_ids")
        if codes is None or current.source != "input_ids" or not isinstance(ids, Tensor):
            return
        count = int(torch.isin(ids, ids.new_tensor(codes(self._state.model.config))).sum())
        if count:
            warnings.warn(
                f"PRe: {count} ids of the batch are codes of pictures, which are not counted as "
                "visual tokens; set pre.next_visual_mask before each call to regularise them",
                stacklevel=2,
            )


def run(state: State, batch: Mapping[str, Any]) -> None:
    """As `PRe.check`, of a batch."""
    model: nn.Module = state.model
    modes = {module: module.training for module in model.modules()}
    before = state.last, state.loss
    state.is_checking = True
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()(**batch)
    finally:
        state.is_checking = False
        state.last, state.loss = before
        for module, mode in modes.items():
            module.training = mode


def _visual(current: Pass) -> Tensor:
    """Bool, (rows, length): the visual positions that attention shows."""
    visual = torch.zeros(current.shape, dtype=torch.bool, device=current.index.device)
    visual.view(-1)[current.index] = True
    return visual


def _differs(states: Tensor, tables: list[Tensor]) -> Tensor:
    """Bool, (rows, length): where a row is that of no table."""
    return torch.stack([(states != table).any(dim=-1) for table in tables]).all(dim=0)


def _name(model: Any, token: int) -> str:
    """Of an id in the model's config, in brackets; "" where it has none."""
    config: Any = getattr(model, "config", None)
    values: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    names = [name for name, value in values.items() if type(value) is int and value == token]
    names = [name for name in names if "token" in name]
    return f" ({names[0]})" if names else ""
