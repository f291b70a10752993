# SPDX-License-Identifier: Apache-2.0
"""PRe: the handle of Predictive Regularization on a model: its heads, its figures, its files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prereg_kernels.attach import parameter_groups as groups
from prereg_kernels.attach import saving
from prereg_kernels.attach.check import run
from prereg_kernels.attach.config import PReConfig, check_rate
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.figures import figures_of
from prereg_kernels.attach.image_spans import count_images
from prereg_kernels.attach.loop_settings import LoopSettings
from prereg_kernels.attach.passes import Collected
from prereg_kernels.attach.state import State
from prereg_kernels.ops.head import PReHead

ATTRIBUTE = "_prereg"  # the attribute of the model that holds the handle


def get_pre(model: nn.Module) -> PRe | None:
    """The PRe on a model, or on the model in a wrapper (DDP, PEFT); None if there is none."""
    for module in model.modules():
        if ATTRIBUTE in vars(module):
            return vars(module)[ATTRIBUTE]
    return None


def find_pre(model: nn.Module) -> PRe:
    """The PRe on a model, or on the model inside of a wrapper (DDP, PEFT).

    Raises:
        ValueError: none is attached.

    Example:
        >>> pre = apply_pre(model)
        >>> find_pre(torch.nn.Sequential(model)) is pre
        True
    """
    pre = get_pre(model)
    if pre is None:
        raise ValueError(
            f"model: expected one with PRe attached, got a plain {type(model).__name__}; "
            "call prereg_kernels.apply_pre(model), before you make the optimizer or trainer"
        )
    return pre


def state_of(pre: PRe) -> State:
    """The state behind the handle, for trainers and other parts of the package."""
    return pre._state


class PRe(LoopSettings):
    """PRe on a model: `apply_pre` returns it, and `remove_pre` takes it off.

    Example:
        >>> pre = apply_pre(model, layers=[1, 3], level="global")
        >>> pre  # the settings, then where the model keeps things, and how that was found
        PRe(layers=[1, 3], weight=0.5, anchor='pre_llm', level='global', head_parameters=2,400)
          family: LLaVA, listed
          layers: model.language_model.layers: 4 LlamaDecoderLayer, by get_decoder()
          language_model: model.language_model: it holds the layers and takes inputs_embeds
          visual_tokens: image_token_id = 39
        >>> pre.heads[3].weights[0].shape
        torch.Size([24, 24])
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def __repr__(self) -> str:
        config, parameters = self.config, sum(map(math.prod, self._state.shapes.values()))
        anchor = getattr(config.anchor, "__name__", config.anchor)
        return (
            f"PRe(layers={list(self.heads)}, weight={config.weight}, anchor={anchor!r}, "
            f"level={config.level!r}, head_parameters={parameters:,})\n"
            + indent("\n".join(self._state.found), "  ")
        )

    @property
    def family(self) -> Family:
        """Where the model keeps its parts: as given, listed or found, and complete."""
        return self._state.family

    @property
    def heads(self) -> dict[int, PReHead]:
        """{layer: PReHead}; with `share_head`, the same one for every layer."""
        return self._state.heads

    @property
    def config(self) -> PReConfig:
        """The settings."""
        return self._state.config

    @property
    def weight(self) -> float | Tensor:
        """lambda of the next training calls: a number or 0-dim Tensor, at least 0.

        It starts as the weight of the settings. A training loop with a schedule sets it every
        step, as PReTrainer does. If it is the number 0, L_PRe is not computed, and the heads get
        gradients of 0. With level="global" and in graphs of torch.compile L_PRe is computed.

        Example:
            >>> pre = apply_pre(model, weight=0.5, weight_schedule="linear")
            >>> pre.weight = pre.config.weight_at(step=30, steps=40)
            >>> pre.weight
            0.125
        """
        return self._state.weight

    @weight.setter
    def weight(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.dim() or value.requires_grad:
                raise ValueError(
                    "weight: expected a number or a 0-dim Tensor without gradient, got shape "
                    f"{tuple(value.shape)}, requires_grad={value.requires_grad}"
                )
        else:
            check_rate("weight", value)
        self._state.weight = value

    @property
    def watches_gradients(self) -> bool:
        """Whether the next passes measure the gradients of L_LM and L_PRe, for `metrics`.

        That costs two thirds of the tap's work once more, and no sync. Set it for one pass in many.
        It does not work with level="global". Graphs of torch.compile have no such figures.
        """
        return self._state.watches_gradients

    @watches_gradients.setter
    def watches_gradients(self, value: bool) -> None:
        if value and self.config.level == "global":
            raise ValueError(
                "watches_gradients: expected False with level='global', whose gradient is that of "
                "means; got True"
            )
        self._state.watches_gradients = bool(value)

    def metrics(self) -> dict[str, float]:
        """Figures of the last training call; with `value_in_eval`, of an evaluation call too.

        Under torch.distributed the figures are reduced over all ranks, so call this on every rank.
        Ranks that share a batch count once.

        Returns:
            "pre_loss": L_PRe, averaged over the visual tokens or images, and over the layers.
            Several layers have "pre_loss/layer_16" each, too. It is there once backward has
            computed it. With `token_fraction` it is an estimate from the drawn tokens.
            "lm_loss", averaged over the tokens with a label, if the model computed it.
            "visual_tokens", and with level="global" "images". Empty before the first call.

            With `watches_gradients`, after backward, there are three figures of the gradients
            with respect to the layer's states at the visual tokens. "lm_hidden_grad_norm" is the
            norm of what comes from L_LM; with several layers, L_PRe of the layers above is part
            of it. "pre_hidden_grad_norm" is the norm of what weight * L_PRe adds at this layer.
            "hidden_grad_cosine" is the cosine between both: below 0, PRe pulls against L_LM.
            Several layers have "hidden_grad_cosine/layer_16" each, and so on. The norms have the
            scale of the loss that is differentiated, averaged over data-parallel ranks.

        Example:
            >>> pre = apply_pre(model)
            >>> pre.metrics()
            {}
            >>> model(**batch).loss.backward()
            >>> pre.metrics()["visual_tokens"]
            8.0
        """
        last, copies = self._state.last, self._state.copies
        return {} if last is None else figures_of(last, self.config.level, copies)

    def totals(self) -> Tensor | None:
        """Sums over the rows of the last training call, without a sync or a collective.

        Returns:
            (1 + layers,), float32, on the device: the number of rows, and for each layer the sum
            of the rows' losses. Rows are visual tokens, or images with level="global". None until
            backward has computed the losses.

        Example:
            >>> pre = apply_pre(model)
            >>> model(**batch).loss.backward()
            >>> rows, total = pre.totals()
            >>> rows.item()
            8.0
            >>> abs((total / rows).item() - pre.metrics()["pre_loss"]) < 1e-6
            True
        """
        last = self._state.last
        return torch.stack([last.rows, *last.sums()]) if last and last.is_complete() else None

    @contextmanager
    def collecting(self) -> Iterator[list[Collected]]:
        """Collect several forward passes for one loss, in the list that the context returns.

        Meanwhile the model's loss stays L_LM and `loss` is None, whatever `add_to_loss` is. Add the
        terms in the list to your loss. With `value_in_eval` evaluation passes are in it too.

        Example:
            >>> pre = apply_pre(model)
            >>> with pre.collecting() as passes:
            ...     losses = [model(**batch).loss for _ in range(2)]
            >>> (sum(losses) + sum(each.term for each in passes)).backward()
            >>> [each.record.rows.item() for each in passes]
            [8.0, 8.0]
        """
        state, passes = self._state, list[Collected]()
        before, state.collected = state.collected, passes
        try:
            yield passes
        finally:
            state.collected = before

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """How many rows L_PRe of a batch is the mean over: 0-dim, int64, without a sync.

        The rows are its visual tokens, whatever `token_fraction` is, or with level="global" its
        images. A step's `denominator` is the sum over its micro-batches and ranks, divided by the
        ranks over which gradients are averaged.

        Args:
            batch: the keyword arguments of the model's forward.

        Example:
            >>> pre = apply_pre(model)
            >>> pre.denominator = pre.count(batch)
            >>> pre.denominator
            tensor(8)
        """
        family = self.family
        marked = family.marked(self._state.model, batch)
        shown = family.shown(marked, batch.get("attention_mask"))
        if self.config.level == "global":
            ids = batch["input_ids"] if family.visual_mask is None else marked
            return count_images(family, batch, ids, marked, shown)
        return shown.sum()

    def visual_mask(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
        """Where the visual tokens are: bool, the shape of `input_ids`.

        Args:
            attention_mask: as the model takes it. A token that it hides is padding, not visual.

        Example:
            >>> pre = apply_pre(model)
            >>> pre.visual_mask(batch["input_ids"]).sum(dim=1)  # 4 in the one image of each row
            tensor([4, 4])
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        marked = self.family.marked(self._state.model, batch)
        return self.family.shown(marked, attention_mask)

    def check(self, batch: Mapping[str, Any] | None = None) -> None:
        """Check that the heads train and, on a batch, that PRe has the right visual tokens.

        The first training steps check that by themselves, except in a graph of torch.compile. Here
        the model runs the batch in eval mode, without grad and uncompiled. No state is kept.

        Args:
            batch: keyword arguments of the model's forward, with images.

        Raises:
            ValueError: a head is frozen, visual positions have no visual features, or the sequence
                or layers have another shape.

        Warns:
            UserWarning: some tokens get features and are not counted as visual, or nothing can be
                compared, because the model changes every row of its embedding table.

        Example:
            >>> pre = apply_pre(model)
            >>> pre.check(batch)
            >>> pre.heads[2].requires_grad_(False).depth
            2
            >>> pre.check()
            Traceback (most recent call last):
            ValueError: pre.heads: expected heads that train, got a frozen one at layer 2 ...
        """
        self._state.check_heads_train()
        if batch is not None:
            run(self._state, batch)

    def parameter_groups(
        self, learning_rate: float, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: what trains in the model, and the heads.

        Biases and norms have no decay, as in transformers' Trainer. The heads have
        `head_learning_rate` and `head_weight_decay`, if the settings give them.

        Args:
            learning_rate, weight_decay: for the model.

        Example:
            >>> pre = apply_pre(model, head_learning_rate=1e-3)
            >>> groups = pre.parameter_groups(learning_rate=1e-5, weight_decay=0.1)
            >>> optimizer = torch.optim.AdamW(groups)
            >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            [(1e-05, 0.1), (1e-05, 0.0), (0.001, 0.1), (0.001, 0.0)]
        """
        return groups.parameter_groups(self._state, learning_rate, weight_decay)

    def save(self, path: str | Path, heads: Mapping[str, Tensor] | None = None) -> None:
        """Write the heads and the settings into the directory `path`, into one file.

        The file appears whole or not at all. If the heads are sharded (DTensor), all ranks have to
        call this, and rank 0 writes. Otherwise each caller writes. Under DDP one rank is enough,
        and several do no harm.

        Args:
            heads: the parameters to write in place of the model's own:
                {name inside of `model.pre_heads`: whole parameter}.

        Raises:
            ValueError: the parameters are not whole, as with DeepSpeed ZeRO-3 and FSDP1.

        Example:
            >>> pre = apply_pre(model, layers=3)
            >>> pre.save("heads")
            >>> remove_pre(model)
            >>> apply_pre(model, from_pretrained="heads").config.layers
            (3,)
        """
        saving.save(self._state, path, heads)

    def load(self, path: str | Path) -> None:
        """Read the heads that `save` wrote to the directory `path`, or to `path/pre`.

        The heads keep the dtype and device that they have on the model. On the meta device they
        get the values when they leave it.

        Raises:
            FileNotFoundError: there are no heads.
            ValueError: the heads cannot be read, or have other layers, shapes or settings, or the
                model's own heads are not whole (see `save`).

        Example:
            >>> pre = apply_pre(model)
            >>> pre.save("heads")
            >>> before = pre.heads[2].weights[0].clone()
            >>> pre.heads[2].reset_parameters()
            >>> pre.load("heads")
            >>> torch.equal(pre.heads[2].weights[0], before)
            True
        """
        saving.load(self._state, path)

    if not TYPE_CHECKING:  # type checkers report these names, as any other that is not there

        def __getattr__(self, name: str) -> Any:
            """Attributes that version 0.1 had here."""
            if name not in _MOVED:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            instead, read = _MOVED[name]
            warnings.warn(
                f"PRe.{name} is no longer public; use {instead}", DeprecationWarning, stacklevel=2
            )
            return read(self._state)


# {name: (what to use, where it is now)}
_MOVED: dict[str, tuple[str, Callable[[State], Any]]] = {
    "anchor_features": ("pre.config.anchor_features", attrgetter("anchor_features")),
    "check_heads_train": ("pre.check", attrgetter("check_heads_train")),
    "detach": ("prereg_kernels.remove_pre(model)", attrgetter("detach")),
    "fill": ("pre.load", lambda state: partial(saving.fill, state)),
    "hooks": ("prereg_kernels.remove_pre(model) to remove them", attrgetter("hooks")),
    "last": ("pre.metrics() and pre.totals()", attrgetter("last")),
    "model": ("the model that you gave to apply_pre", attrgetter("model")),
}
