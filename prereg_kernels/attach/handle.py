"""PRe: the handle of Predictive Regularization on a model: its heads, its figures, its files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prereg_kernels._util import distributed, fsdp
from prereg_kernels.attach.anchors import anchor_width, llm_width
from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.families import Family
from prereg_kernels.attach.figures import figures_of
from prereg_kernels.attach.heads import PASSES, Heads
from prereg_kernels.attach.image_spans import check_images, count_images
from prereg_kernels.attach.passes import Collected, Record
from prereg_kernels.attach.storage import (
    PRE_DIR,
    Saved,
    check_settings,
    check_shapes,
    load_heads,
    save_heads,
)
from prereg_kernels.attach.visual import find_visual
from prereg_kernels.ops.head import PReHead

HEADS = "pre_heads"  # the name under which the heads are registered on the model
ATTRIBUTE = "_prereg"  # the attribute of the model that holds the handle


def get_pre(model: nn.Module) -> PRe | None:
    """The PRe that is attached to a model, or to one inside of a wrapper (DDP, PEFT); or None."""
    for module in model.modules():
        if ATTRIBUTE in vars(module):
            return vars(module)[ATTRIBUTE]
    return None


def find_pre(model: nn.Module) -> PRe:
    """As `get_pre`.

    Raises:
        ValueError: none is attached.
    """
    pre = get_pre(model)
    if pre is None:
        raise ValueError(
            f"model: expected one with PRe attached, got a plain {type(model).__name__}; "
            "call prereg_kernels.apply_pre(model), before you make the optimizer or trainer"
        )
    return pre


class PRe:
    """PRe on a model: made by `apply_pre`.

    Attributes:
        heads: {layer: PReHead}; with `share_head`, the same one for every layer.
        config: the settings. anchor_features: A.
        denominator: None, or what `count` gives (a number or 0-dim Tensor) for the whole optimizer
            step, summed over micro-batches and ranks: L_PRe of each call is then a sum over its
            visual tokens (or images) divided by this. A training loop that accumulates gradients
            sets it every step.
        loss: the weighted term of the last training call where it was not added to the model's
            loss: the model got no labels and so computed none, or `add_to_loss` is False. Add it
            to your loss. Where you do not, and the call had no labels, backward adds its gradient
            by itself (`PReConfig.gradient`). None otherwise.
        add_to_loss: False: leave the model's loss alone, for loops that compute their own from
            other outputs, and add `loss` to it.
        loss_scale: what your loop multiplies its loss by before backward, such as a GradScaler's
            scale or 1 / accumulation steps: a number or 0-dim Tensor. It scales the gradient that
            backward adds by itself, which is in no loss of yours.
        passes: training calls so far, by which `token_fraction` draws; saved with the heads, and
            part of the model's `state_dict`.
    """

    def __init__(self, model: Any, config: PReConfig, family: Family) -> None:
        layers = family.layers_of(model)
        family.language_model_of(model)  # before anything is registered: it may not be there
        numbers = config.resolve_layers(len(layers))
        if config.level == "global":
            check_images(family)
        self.model, self.config, self.family = model, config, family
        self.anchor_features = anchor_width(config, family, model)
        self.denominator: float | Tensor | None = None
        self.loss: Tensor | None = None
        self.loss_scale: float | Tensor = 1.0
        self.add_to_loss = True
        self.passes = 0
        self.last: Record | None = None
        self.collected: list[Collected] | None = None  # while `collecting` is open
        self.hooks: list[RemovableHandle] = []
        family.visual_token_ids(model)  # raises where there are none

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
        # `save_pretrained` then writes a plain model, and the heads to a file of their own
        self._shapes = {name: tuple(x.shape) for name, x in self._state().items()}
        ignored = {f"{HEADS}.{name}" for name in (*self._shapes, PASSES)}
        before = getattr(model, "_keys_to_ignore_on_save", None) or ()
        self.shadow("_keys_to_ignore_on_save", {*before, *ignored})
        # What accelerate's FSDP gives a unit of its own, which may then have a dtype of its own
        names_of_units = getattr(model, "_no_split_modules", None) or []
        self.shadow("_no_split_modules", type(names_of_units)([*names_of_units, PReHead.__name__]))
        if hasattr(model, "save_pretrained"):
            self.shadow("save_pretrained", self._save_pretrained)
        self.hooks.append(model.register_load_state_dict_post_hook(self._draw_heads))
        setattr(model, ATTRIBUTE, self)

    def module_of(self, layer: int) -> nn.Module:
        """The head to call: what a wrapper, as of FSDP1, has put into its place in the model."""
        return getattr(self.model, HEADS)[self._name_of[layer]]

    def __repr__(self) -> str:
        config, parameters = self.config, sum(map(math.prod, self._shapes.values()))
        anchor = getattr(config.anchor, "__name__", config.anchor)
        return (
            f"PRe(layers={list(self.heads)}, weight={config.weight}, anchor={anchor!r}, "
            f"level={config.level!r}, head_parameters={parameters:,})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a term that waits for backward belongs to this one alone."""
        return vars(self) | {"loss": None, "collected": None}

    @property
    def is_attached(self) -> bool:
        """Whether the model has this PRe; not after `remove_pre`."""
        return vars(self.model).get(ATTRIBUTE) is self

    def shadow(self, name: str, value: Any) -> None:
        """Give the model an attribute of its own, until `detach`."""
        if name in vars(self.model):
            self._before[name] = vars(self.model)[name]
        self._ours[name] = value
        setattr(self.model, name, value)

    def metrics(self) -> dict[str, float]:
        """Figures of the last training call; with `value_in_eval`, of an evaluating one too.

        Returns:
            "pre_loss": L_PRe, averaged over the visual tokens, or images (and the layers; each
            layer has "pre_loss/layer_16" too where there are several), once backward has computed
            it, with `token_fraction` as estimated from those drawn; "lm_loss", where the model
            computed it, averaged over the tokens with a label; "visual_tokens"; "images" with
            level="global". Under torch.distributed
            these are reduced over all ranks, so call it on every rank; ranks that share a batch
            count once. Empty before the first call.
        """
        if self.last is None:
            return {}
        return figures_of(self.last, self.config.level, distributed.copies(self.model))

    def totals(self) -> Tensor | None:
        """Sums over the rows of the last training call, without a sync or a collective.

        Returns:
            (1 + layers,), float32, on the device: the number of rows, which are visual tokens or,
            with level="global", images; and for each layer the sum over them of the row's loss.
            None until backward has computed them.
        """
        last = self.last
        return torch.stack([last.rows, *last.sums()]) if last and last.is_complete() else None

    @contextmanager
    def collecting(self) -> Iterator[list[Collected]]:
        """For a loss of several forward passes: the list that is given gets each one of them.

        Meanwhile the model's loss stays L_LM, and `loss` None, whatever `add_to_loss` is: add the
        terms in the list to your loss. Evaluating passes are there with `value_in_eval`.
        """
        before, self.collected = self.collected, []
        try:
            yield self.collected
        finally:
            self.collected = before

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """0-dim, int64: the rows that L_PRe of a batch is the mean over, without a sync.

        These are its visual tokens, whatever `token_fraction` is, or with level="global" its
        images. What a step divides by is the sum over its micro-batches and ranks.

        Args:
            batch: the keyword arguments of the model's forward.
        """
        ids, attention = batch["input_ids"], batch.get("attention_mask")
        if self.config.level == "global":
            by_id = self.visual_mask(ids)
            return count_images(self.family, batch, ids, by_id, self.visual_mask(ids, attention))
        return self.visual_mask(ids, attention).sum()

    def visual_mask(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
        """Where the visual tokens are: bool, the shape of `input_ids`.

        Args:
            attention_mask: as the model takes it; a token that it hides is padding, not visual.
        """
        tokens = self.family.visual_token_ids(self.model)
        return find_visual(input_ids, tokens, attention_mask)

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

    def save(self, path: str | Path, heads: Mapping[str, Tensor] | None = None) -> None:
        """Write the heads and the settings into the directory `path`, into one file.

        It appears whole or not at all. Where the heads are sharded (DTensor), all ranks have to
        call this, and rank 0 writes. Elsewhere whoever calls it writes: under DDP one rank is
        enough, and several do no harm.

        Args:
            heads: what to write in place of the model's own parameters:
                {name inside of `model.pre_heads`: whole parameter}.

        Raises:
            ValueError: parameters that are not whole, as with DeepSpeed ZeRO-3 and FSDP1.
        """
        own = self._state()
        whole = {n: distributed.whole(x) for n, x in (own if heads is None else heads).items()}
        self._check_whole(whole)
        if any(x.is_meta for x in whole.values()):
            raise ValueError(
                "heads: expected parameters with values, got them on the meta device; save them "
                "once the model has left it, or pass heads="
            )
        sharded = heads is None and any(map(distributed.is_sharded, own.values()))
        if not sharded or distributed.rank() == 0:
            save_heads(Path(path), Saved(whole, self._json(), self.passes))

    def load(self, path: str | Path) -> None:
        """Read the heads that `save` wrote to the directory `path`, or to `path/pre`.

        They keep the dtype and device that they have on the model; on the meta device they get the
        values as they leave it.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they cannot be read, or do not fit: other layers, shapes or settings; or the
                model's are not whole (see `save`).
        """
        saved = load_heads(path)
        check_settings(saved, self._json(), path)
        self.fill(saved, path)

    def fill(self, saved: Saved, path: str | Path) -> None:
        """As `load`, of what was read there, whatever the settings that do not shape the heads."""
        own = self._state()
        self._check_whole(own)
        check_shapes(saved, self._json(), self._shapes, path)
        self.passes = saved.passes
        for key, head in getattr(self.model, HEADS).items():
            head.fill({name: saved.heads[f"{key}.{name}"] for name, _ in head.named_parameters()})

    def detach(self) -> None:
        """See `remove_pre`."""
        for hook in self.hooks:
            hook.remove()
        delattr(self.model, HEADS)
        delattr(self.model, ATTRIBUTE)
        for name, ours in self._ours.items():
            if vars(self.model).get(name) != ours:  # replaced, or wrapped, by somebody since
                continue
            if name in self._before:
                setattr(self.model, name, self._before[name])
            else:
                delattr(self.model, name)

    def _save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own `save_pretrained`, and then PRe's file in `pre/`.

        A `state_dict` without heads leaves them out.
        """
        original = self._before.get("save_pretrained")
        if original is None:
            original = partial(type(self.model).save_pretrained, self.model)
        bound = inspect.signature(original).bind(save_directory, *args, **kwargs)
        bound.apply_defaults()
        options = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        state = options.get("state_dict")
        if not self.is_attached:  # somebody has kept this method
            return original(save_directory, *args, **kwargs)
        heads = None if state is None else heads_of(state)  # before they are taken out of it
        result = original(save_directory, *args, **kwargs)
        if heads != {}:
            heads = {n: distributed.whole(x) for n, x in (heads or self._state()).items()}
            if options.get("is_main_process", True) and distributed.rank() == 0:
                self.save(Path(save_directory) / PRE_DIR, heads)
                if options.get("push_to_hub"):
                    _upload(Path(save_directory) / PRE_DIR, options)
        return result

    def _check_whole(self, heads: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(x.shape) for name, x in heads.items()}
        if shapes != self._shapes:
            raise ValueError(
                f"heads: expected whole parameters, {self._shapes}, got {shapes}; where DeepSpeed "
                "ZeRO-3 or FSDP1 partitions them, load before they wrap the model, and save with "
                "heads= (or save_pretrained with state_dict=) from a gathered state dict"
            )

    def _json(self) -> dict[str, Any]:
        return self.config.to_json(list(self.heads))

    def _state(self) -> dict[str, Tensor]:
        return dict(getattr(self.model, HEADS).named_parameters())

    def _make_head(self, layer: nn.Module) -> PReHead:
        like = next(layer.parameters())
        config = self.config
        head = PReHead(
            llm_width(self.model),
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
        """Where a state dict, by `assign=True`, left them alone on the meta device."""
        layers = self.family.layers_of(self.model)
        for number, head in self.heads.items():
            like = next(layers[number - 1].parameters())
            if not like.is_meta and all(parameter.is_meta for parameter in head.parameters()):
                head.to_empty(device=like.device)


def heads_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The heads in a state dict of the model, or of one around it: {name inside: parameter}."""
    marked = ((name.partition(f"{HEADS}."), x) for name, x in state_dict.items())
    return {inside: x for (_, mark, inside), x in marked if mark and inside != PASSES}


def _upload(folder: Path, options: Mapping[str, Any]) -> None:
    """To where `save_pretrained(push_to_hub=True)` has put the model, in a commit of its own."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.get("token"))
    name = options.get("repo_id") or folder.parent.resolve().name
    api.upload_folder(
        repo_id=api.create_repo(name, exist_ok=True).repo_id,
        folder_path=folder,
        path_in_repo=folder.name,
        commit_message=options.get("commit_message") or "Upload PRe's heads",
        create_pr=options.get("create_pr", False),
    )
