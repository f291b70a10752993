# SPDX-License-Identifier: Apache-2.0
"""State: all that PRe keeps about a model. Hooks and trainers write it; `PRe` shows part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prereg_kernels._util import distributed, fsdp, private
from prereg_kernels.attach.anchors import anchor_width, llm_width
from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.heads import PASSES, Heads
from prereg_kernels.attach.image_spans import check_images
from prereg_kernels.attach.masks import NextMask
from prereg_kernels.attach.passes import Collected, Record
from prereg_kernels.attach.resolver import Resolution, is_pair
from prereg_kernels.attach.sequence_parallel import SequenceParallel
from prereg_kernels.attach.stages import check_stage
from prereg_kernels.ops.head import PReHead

OF_THE_LOSS = ("labels", "num_items_in_batch")  # arguments
HEADS = "pre_heads"  # the name under which the heads are registered on the model


class State:
    """PRe on a model, from `apply_pre` to `remove_pre`.

    Attributes:
        model, config, family: as `apply_pre` has resolved them. origin, how: see `Resolution`.
        anchor_features: A. first_label: see `Pass`.
        heads, weight, denominator, loss, loss_scale, add_to_loss, passes: see `PRe`.
        watches_gradients, sequence_parallel: see `PRe`.
        item_ranks: the ranks over which a trainer counts `num_items_in_batch`; None: nobody said.
        given_group: `PRe.tensor_parallel_group`, if it was set.
        next_mask: `PRe.next_visual_mask`, and what became of the masks before.
        batch: the batch of a trainer's step, for calls that no longer have its ids; or None.
        encoded: what entered the projector before such a call.
        last: the record of the last training call; with `value_in_eval`, of an evaluation too.
        collected: the passes so far while `PRe.collecting` is open; else None.
        shapes: {name inside of `model.pre_heads`: shape of the whole parameter}.
        hooks: the hooks on the model, to be removed.
        is_attached: False after `detach`. is_checking: True while `PRe.check` runs a batch.
    """

    def __init__(self, model: Any, config: PReConfig, resolution: Resolution) -> None:
        family = resolution.family
        layers = family.layers_of(model)
        family.language_model_of(model)  # before anything is registered: it may not be there
        numbers = config.resolve_layers(len(layers))
        check_stage(layers, max(numbers), len(layers))
        self._layer_count = len(layers)
        if config.level == "global":
            check_images(family)
        self.model, self.config, self.family = model, config, family
        self.origin, self.how = resolution.origin, resolution.how
        # A token predicts the label behind it, but a decoder of its own all of its labels
        self.first_label = 0 if is_pair(getattr(model, "config", None)) else 1
        self.anchor_features = anchor_width(config, family, model)
        self.weight: float | Tensor = config.weight
        self.watches_gradients = False
        self.denominator: float | Tensor | None = None
        self.loss: Tensor | None = None
        self.loss_scale: float | Tensor | None = None  # nobody has set it: 1
        self.item_ranks: int | None = None
        self.add_to_loss = True
        self.passes = 0
        self.sequence_parallel: SequenceParallel | None = None
        self.given_group: distributed.Held | None = None
        self.next_mask = NextMask()
        self.batch: Mapping[str, Any] | None = None
        self.encoded: list[Tensor] = []
        self.last: Record | None = None
        self.collected: list[Collected] | None = None
        self.hooks: list[RemovableHandle] = []
        self.is_attached, self.is_checking = True, False
        family.visual_token_ids(model), family.other_token_ids(model)  # raise where there are none
        _check_entry(family.entry_of(model), numbers)

        self.heads: dict[int, PReHead]
        if config.share_head:
            shared = self._make_head(layers[numbers[0] - 1])
            self.heads, names = dict.fromkeys(numbers, shared), {"shared": shared}
        else:
            self.heads = {number: self._make_head(layers[number - 1]) for number in numbers}
            names = {str(number): head for number, head in self.heads.items()}
        self._name_of = {n: "shared" if config.share_head else str(n) for n in numbers}
        model.add_module(HEADS, Heads(names, self))
        self._before: dict[str, Any] = {}
        self._ours: dict[str, Any] = {}
        self.shapes = {name: tuple(x.shape) for name, x in self.parameters().items()}
        # `save_pretrained` then writes a plain model
        ignored = {f"{HEADS}.{name}" for name in (*self.shapes, PASSES)}
        before = getattr(model, private.IGNORED_ON_SAVE, None) or ()
        self.shadow(private.IGNORED_ON_SAVE, {*before, *ignored})
        # What accelerate's FSDP gives a unit of its own, which may then have a dtype of its own
        names_of_units = getattr(model, private.UNSPLIT_MODULES, None) or []
        units = type(names_of_units)([*names_of_units, PReHead.__name__])
        self.shadow(private.UNSPLIT_MODULES, units)
        self.hooks.append(model.register_load_state_dict_post_hook(self._draw_heads))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which do not get a term that waits for backward."""
        return vars(self) | {"loss": None, "collected": None, "batch": None, "encoded": []}

    @contextmanager
    def computing_on(self, batch: Any) -> Iterator[None]:
        """Meanwhile calls without `input_ids` are of this batch, if their sequence has its shape.

        As where a trainer's hook makes `inputs_embeds` of the ids before the model is called.
        """
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        before, self.batch = self.batch, dict(batch) if isinstance(ids, Tensor) else None
        try:
            yield
        finally:
            self.batch = before
            self.encoded.clear()

    def completed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments; without ids, with those of the batch that it is of, if there is one.

        Not its labels: whether the call gets them decides what its loss holds.
        """
        embeddings = inputs.get("inputs_embeds")
        if inputs.get("input_ids") is not None or embeddings is None:
            return inputs
        batch = self.batch
        if batch is None or embeddings.shape[:-1] != batch["input_ids"].shape:
            return inputs
        given = {name for name, value in inputs.items() if value is not None}
        return inputs | {n: batch[n] for n in batch.keys() - given - {*OF_THE_LOSS}}

    @property
    def tensor_group(self) -> Any:
        """The process group of the ranks that have the same hidden states; or None."""
        if self.given_group is not None:
            return self.given_group.group
        return distributed.tensor_group(self.model)

    @property
    def sequence_group(self) -> Any:
        """The process group of the ranks that share each sequence."""
        assert self.sequence_parallel is not None
        return self.sequence_parallel.group

    @property
    def copies(self) -> int:
        """How many ranks compute each token's loss, or share that work: its value is on all."""
        shared = self.sequence_parallel
        if shared is not None and shared.gradients == "none":
            return 1
        if self.tensor_group is None:
            return distributed.tensor_ranks(self.model)
        return distributed.size_of(self.tensor_group)

    @property
    def replica(self) -> int:
        """The same on ranks with the same tokens, and another on others."""
        ranks = [distributed.rank()]
        if self.copies > 1 and self.tensor_group is not None:
            ranks = torch.distributed.get_process_group_ranks(self.tensor_group)
        first, last = min(ranks), max(ranks)
        is_block = last - first < self.copies
        return first // self.copies if is_block else first

    def groups_of_heads(self) -> dict[str, Any]:
        """The options of a tap that say which ranks share the work of a head."""
        shared = self.sequence_parallel
        if shared is not None and shared.gradients == "none":
            return {"group": shared.group, "same_hidden": False}
        # A graph has no collectives of ours: there each rank does all of it
        return {} if torch.compiler.is_compiling() else {"group": self.tensor_group}

    def parameters(self) -> dict[str, Tensor]:
        """The heads' parameters, {name inside of `model.pre_heads`: parameter}, whole or not."""
        return dict(getattr(self.model, HEADS).named_parameters())

    def settings(self) -> dict[str, Any]:
        """The settings as JSON values, with the resolved layers."""
        return self.config.to_json(list(self.heads))

    def module_of(self, layer: int) -> nn.Module:
        """The head to call: what a wrapper, as of FSDP1, has put into its place in the model."""
        return getattr(self.model, HEADS)[self._name_of[layer]]

    @property
    def found(self) -> list[str]:
        """Where the model keeps its parts, and how that is known; a fact a line."""
        return [f"family: {self.family.name}, {self.origin}"] + [
            f"{field}: {what}" for field, what in self.how.items()
        ]

    def check_stage(self) -> None:
        """Raise ValueError where the decoder's layers have been dealt out to ranks since."""
        check_stage(self.family.layers_of(self.model), max(self.heads), self._layer_count)

    def check_heads_train(self) -> None:
        """Raise ValueError if a head is frozen."""
        for layer, head in self.heads.items():
            parameters = list(head.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                raise ValueError(
                    f"pre.heads: expected heads that train, got a frozen one at layer {layer} "
                    "(PEFT freezes all that it did not make); call requires_grad_(True) on each of "
                    "pre.heads.values(), before you make the optimizer"
                )

    def shadow(self, name: str, value: Any) -> None:
        """Give the model an attribute of its own, until `detach`."""
        if name in vars(self.model):
            self._before[name] = vars(self.model)[name]
        self._ours[name] = value
        setattr(self.model, name, value)

    def shadowed(self, name: str) -> Any:
        """The attribute of its own that the model had before; None if it had none."""
        return self._before.get(name)

    def detach(self) -> None:
        """Take PRe off the model: see `remove_pre`."""
        for hook in self.hooks:
            hook.remove()
        ours = {hook.id for hook in self.hooks}
        for module in self.model.modules():  # copies of a module have copies of its hooks
            private.drop_pre_hooks(module, ours)
        delattr(self.model, HEADS)
        for name, ours in self._ours.items():
            if vars(self.model).get(name) != ours:  # replaced, or wrapped, by somebody since
                continue
            if name in self._before:
                setattr(self.model, name, self._before[name])
            else:
                delattr(self.model, name)
        self.is_attached = False

    def _make_head(self, layer: nn.Module) -> PReHead:
        like = next(layer.parameters())
        config = self.config
        head = PReHead(
            llm_width(self.family.embeddings_of(self.model)),
            self.anchor_features,
            config.head_features,
            depth=config.depth,
            activation=config.activation,
            seed=config.seed,
            device=like.device,
            # ZeRO-3 wants the dtype of what it made itself, and keeps float32 copies of all
            dtype=config.head_dtype_on(like.dtype, as_it_is=distributed.is_partitioned(like)),
        )
        head.home = fsdp.Home(self.model)
        return head

    def _draw_heads(self, *_: Any) -> None:
        """Draw the heads if a state dict, by `assign=True`, left only them on the meta device."""
        layers = self.family.layers_of(self.model)
        for number, head in self.heads.items():
            like = next(layers[number - 1].parameters())
            if not like.is_meta and all(parameter.is_meta for parameter in head.parameters()):
                head.to_empty(device=like.device)


def _check_entry(entry: int | None, layers: tuple[int, ...]) -> None:
    """Raise ValueError where a layer runs before the visual features are there."""
    for layer in layers:
        if entry is not None and layer <= entry:
            raise ValueError(
                f"layers: expected layers after number {entry}, whose successor is the first to "
                f"get visual features, got {layer}"
            )
