"""PRe: the handle of Predictive Regularization on a model: its heads, its figures, its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prereg_kernels.config import PReConfig
from prereg_kernels.families import Family
from prereg_kernels.head import PReHead
from prereg_kernels.storage import read_heads, write_heads

HEADS = "pre_heads"  # the name under which the heads are registered on the model
ATTRIBUTE = "_prereg"  # the attribute of the model that holds the handle


def find_pre(model: nn.Module) -> PRe:
    """The handle of the PRe that is attached to a model, or to one inside of a wrapper (DDP, PEFT).

    Raises:
        ValueError: none is.
    """
    for module in model.modules():
        if ATTRIBUTE in vars(module):
            return vars(module)[ATTRIBUTE]
    raise ValueError(
        f"model: expected one with PRe attached, got a plain {type(model).__name__}; "
        "call prereg_kernels.apply_pre(model) before you make the trainer"
    )


class Record(NamedTuple):
    """What `metrics` reads after a pass: a few numbers on the device, no graph, no batch."""

    tokens: Tensor
    denominator: float | Tensor | None
    lm_loss: Tensor | None
    values: dict[int, Tensor]  # written by backward


class PRe:
    """PRe on a model: made by `apply_pre`.

    Attributes:
        heads: {layer: PReHead}.
        config: the settings.
        denominator: None, or the number of visual tokens (a number or 0-dim Tensor) of the whole
            optimizer step, over micro-batches and ranks: L_PRe of each call is then a sum over its
            tokens divided by this. A training loop that accumulates gradients sets it every step.
        loss: the weighted term of the last training call where it was not added to the model's
            loss: the model got no labels and so computed none, or `add_to_loss` is False. Add it
            to your loss. None otherwise.
        add_to_loss: False: leave the model's loss alone, for loops that compute their own from
            other outputs.
    """

    def __init__(self, model: Any, config: PReConfig, family: Family) -> None:
        layers = family.layers_of(model)
        family.language_model_of(model)  # before anything is registered: it may not be there
        numbers = config.resolve_layers(len(layers))
        self.model, self.config, self.family = model, config, family
        self.denominator: float | Tensor | None = None
        self.loss: Tensor | None = None
        self.add_to_loss = True
        self.last: Record | None = None
        self._visual_tokens = family.visual_token_ids(model)

        self.heads = {number: self._make_head(layers[number - 1]) for number in numbers}
        model.add_module(HEADS, nn.ModuleDict({str(n): head for n, head in self.heads.items()}))
        # `save_pretrained` then writes a plain model; the heads have their own file
        names = {f"{HEADS}.{name}" for name in getattr(model, HEADS).state_dict()}
        self._ignored_before = getattr(model, "_keys_to_ignore_on_save", None)
        model._keys_to_ignore_on_save = {*(self._ignored_before or ()), *names}

        self.hooks: list[RemovableHandle] = []
        setattr(model, ATTRIBUTE, self)

    def metrics(self) -> dict[str, float]:
        """Figures of the last training call; with `value_in_eval`, of an evaluating one too.

        Returns:
            "pre_loss": L_PRe, averaged over the visual tokens (and the layers; each layer has
            "pre_loss/layer_16" too where there are several), once backward has computed it;
            "lm_loss", where the model computed it; "visual_tokens". Under torch.distributed these
            are reduced over all ranks, so call it on every rank. Empty before the first call.
        """
        last = self.last
        if last is None:
            return {}
        columns = [last.tokens, torch.ones_like(last.tokens)]
        if last.lm_loss is not None:
            columns.append(last.lm_loss.to(last.tokens))
        for value in last.values.values():  # sums over tokens, so that ranks can be added up
            divisor = last.tokens if last.denominator is None else last.denominator
            columns.append(value.to(last.tokens) * divisor)
        totals = torch.stack(columns)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        tokens, ranks, *rest = totals.tolist()

        figures = {"visual_tokens": tokens}
        if last.lm_loss is not None:
            figures["lm_loss"] = rest.pop(0) / ranks
        per_layer = [total / max(tokens, 1.0) for total in rest]
        if not all(value._version for value in last.values.values()):  # backward still to come
            return figures
        if per_layer:
            figures["pre_loss"] = sum(per_layer) / len(per_layer)
        if len(per_layer) > 1:
            named = zip(last.values, per_layer, strict=True)
            figures |= {f"pre_loss/layer_{layer}": value for layer, value in named}
        return figures

    def totals(self) -> Tensor | None:
        """Sums over the visual tokens of the last training call, without a sync or a collective.

        Returns:
            (1 + layers,), float32, on the device: the number of visual tokens, and for each layer
            the sum over them of the token's loss. None until backward has computed them.
        """
        last = self.last
        if last is None or not all(value._version for value in last.values.values()):
            return None
        divisor = last.tokens if last.denominator is None else last.denominator
        sums = [value.to(last.tokens) * divisor for value in last.values.values()]
        return torch.stack([last.tokens, *sums])

    def visual_mask(self, input_ids: Tensor) -> Tensor:
        """Where the visual tokens are: bool, the shape of `input_ids`."""
        visual = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in self._visual_tokens:
            visual |= input_ids == token
        return visual

    def save(self, path: str | Path, heads: Mapping[str, Tensor] | None = None) -> None:
        """Write the heads (safetensors) and the config (JSON) into the directory `path`.

        Each file appears whole or not at all.

        Args:
            heads: what to write in place of the model's own parameters, where those are sharded:
                {name inside of `model.pre_heads`: whole parameter}.
        """
        state = self._state() if heads is None else heads
        write_heads(Path(path), state, self.config.to_json(list(self.heads)))

    def load(self, path: str | Path) -> None:
        """Read the heads that `save` wrote.

        Raises:
            FileNotFoundError: there are none at `path`.
            ValueError: they cannot be read, or do not fit: other layers, shapes or settings.
        """
        own = self._state()
        shapes = {name: tuple(x.shape) for name, x in own.items()}
        saved = read_heads(Path(path), shapes, self.config.to_json(list(self.heads)))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])

    def detach(self) -> None:
        """See `remove_pre`."""
        for hook in self.hooks:
            hook.remove()
        delattr(self.model, HEADS)
        delattr(self.model, ATTRIBUTE)
        if self._ignored_before is None:
            del self.model._keys_to_ignore_on_save
        else:
            self.model._keys_to_ignore_on_save = self._ignored_before

    def _state(self) -> dict[str, Tensor]:
        return dict(getattr(self.model, HEADS).named_parameters())

    def _make_head(self, layer: nn.Module) -> PReHead:
        like = next(layer.parameters())
        width = self.model.get_input_embeddings().weight.shape[1]
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            head = PReHead(
                width,
                config.anchor_width(width),
                config.head_features,
                depth=config.depth,
                activation=config.activation,
            )
        return head.to(like.device, like.dtype if like.is_floating_point() else None)
