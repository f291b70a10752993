"""apply_pre: attach Predictive Regularization to a Hugging Face model, through hooks alone.

Four hooks: the model's call begins a forward pass and notes the visual tokens; the language model's
call shows the anchor, its input embeddings; each regularised decoder layer's output goes through
the tap; the model's result gets the term added to its loss.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prereg_kernels.config import PReConfig
from prereg_kernels.families import Family, find_family
from prereg_kernels.files import write_whole
from prereg_kernels.head import PReHead

HEADS = "pre_heads"  # the name under which the heads are registered on the model
_ATTRIBUTE = "_prereg"
_HEADS_FILE, _CONFIG_FILE = "pre_heads.safetensors", "pre_config.json"


def apply_pre(
    model: nn.Module,
    config: PReConfig | None = None,
    *,
    family: Family | None = None,
    **overrides: Any,
) -> PRe:
    """Attach PRe: `model(**batch).loss` then carries the gradient of `L_LM + weight * L_PRe`.

    The heads become parameters of the model: call this before building the optimizer. In training
    the *value* of the loss stays L_LM, unless `value_in_forward=True`; in evaluation nothing
    changes.

    Args:
        model: a supported Hugging Face model, such as `LlavaForConditionalGeneration`.
        config: settings; None: the paper's. overrides: single fields of it.
        family: where the model keeps its parts; None: as `prereg_kernels.families` has it.

    Returns:
        The handle: heads, metrics, save and load.

    Raises:
        ValueError: unsupported or wrapped model, a family that does not fit it, PRe attached
            already, a layer that does not exist.
        TypeError: an unknown setting.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if config is not None and not isinstance(config, PReConfig):
        raise TypeError(f"config: expected a PReConfig or None, got {type(config).__name__}")
    if family is not None and not isinstance(family, Family):
        raise TypeError(f"family: expected a Family or None, got {type(family).__name__}")
    if hasattr(model, _ATTRIBUTE):
        raise ValueError("model: PRe is attached already; call remove_pre(model) first")
    config = (config or PReConfig()).replace(**overrides)
    return PRe(model, config, family or find_family(model))


def remove_pre(model: nn.Module) -> None:
    """Detach PRe; the model is what it was: state_dict keys, hooks, outputs.

    Raises:
        ValueError: PRe is not attached.
    """
    pre = getattr(model, _ATTRIBUTE, None)
    if pre is None:
        raise ValueError("model: PRe is not attached; expected a model that apply_pre was given")
    pre.detach()


@dataclass
class _Pass:
    """What one forward pass of the model needs to remember; gone when it ends."""

    inputs: Mapping[str, Any]
    index: Tensor  # (N,) visual positions in the flattened batch
    training: bool
    denominator: float | Tensor | None
    anchor: Tensor | None = None  # (batch, positions, A) or (N, A)
    losses: dict[int, Tensor] = field(default_factory=dict)  # per layer, 0-dim
    values: dict[int, Tensor] = field(default_factory=dict)  # where their values will be


class _Record(NamedTuple):
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
        layers, language_model = family.layers_of(model), family.language_model_of(model)
        numbers = config.resolve_layers(len(layers))
        self.model, self.config, self.family = model, config, family
        self.denominator: float | Tensor | None = None
        self.loss: Tensor | None = None
        self.add_to_loss = True
        self._pass: _Pass | None = None  # while the model's forward runs
        self._last: _Record | None = None
        self._visual_tokens = family.visual_token_ids(model)
        self._arguments = tuple(inspect.signature(model.forward).parameters)
        self._decoder_arguments = tuple(inspect.signature(language_model.forward).parameters)

        self.heads = {number: self._make_head(layers[number - 1]) for number in numbers}
        model.add_module(HEADS, nn.ModuleDict({str(n): head for n, head in self.heads.items()}))
        # `save_pretrained` then writes a plain model; the heads have their own file
        names = {f"{HEADS}.{name}" for name in getattr(model, HEADS).state_dict()}
        self._ignored_before = getattr(model, "_keys_to_ignore_on_save", None)
        model._keys_to_ignore_on_save = {*(self._ignored_before or ()), *names}

        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            language_model.register_forward_pre_hook(self._see_embeddings, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for number in numbers:
            hook = partial(self._see_layer, number)
            self._handles.append(layers[number - 1].register_forward_hook(hook))
        setattr(model, _ATTRIBUTE, self)

    def metrics(self) -> dict[str, float]:
        """Figures of the last training call; with `value_in_eval`, of an evaluating one too.

        Returns:
            "pre_loss": L_PRe, averaged over the visual tokens (and the layers; each layer has
            "pre_loss/layer_16" too where there are several), once backward has computed it;
            "lm_loss", where the model computed it; "visual_tokens". Under torch.distributed these
            are reduced over all ranks, so call it on every rank. Empty before the first call.
        """
        last = self._last
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
        last = self._last
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
        from safetensors.torch import save

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = self._state() if heads is None else heads
        heads = {name: x.detach().contiguous() for name, x in state.items()}
        config = json.dumps(self.config.to_json(list(self.heads)), indent=2)
        write_whole(path / _CONFIG_FILE, config)
        write_whole(path / _HEADS_FILE, save(heads))

    def load(self, path: str | Path) -> None:
        """Read the heads that `save` wrote.

        Raises:
            FileNotFoundError: there are none at `path`.
            ValueError: they cannot be read, or do not fit: other layers, shapes or settings.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for file in (Path(path) / _HEADS_FILE, Path(path) / _CONFIG_FILE):
            if not file.is_file():
                raise FileNotFoundError(f"path: expected a directory with {file.name}, got {path}")
        try:
            saved = load_file(Path(path) / _HEADS_FILE)
            config = dict(json.loads((Path(path) / _CONFIG_FILE).read_bytes()))
        except (SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"path: {path} cannot be read: {error}") from None
        mine = self.config.to_json(list(self.heads))
        for name in ("layers", "depth", "activation", "loss", "normalize"):
            if config.get(name) != mine[name]:
                raise ValueError(
                    f"path: the heads in {path} were trained with {name}={config.get(name)!r}, "
                    f"expected {mine[name]!r}"
                )
        own = self._state()
        theirs = {name: tuple(x.shape) for name, x in saved.items()}
        ours = {name: tuple(x.shape) for name, x in own.items()}
        if theirs != ours:
            raise ValueError(f"path: heads do not fit: expected {ours}, got {theirs} in {path}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])

    def detach(self) -> None:
        """See `remove_pre`."""
        for handle in self._handles:
            handle.remove()
        delattr(self.model, HEADS)
        delattr(self.model, _ATTRIBUTE)
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

    # The hooks, in the order in which a forward pass meets them.

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        training = model.training and torch.is_grad_enabled()
        self._pass = None
        if not training and not self.config.value_in_eval:
            return
        if training:
            self.loss = self._last = None
        inputs = dict(zip(self._arguments, args, strict=False)) | kwargs
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise ValueError("input_ids: PRe finds the visual tokens by it; expected ids, got None")
        index = self.visual_mask(input_ids).flatten().nonzero().squeeze(1)
        # with no visual tokens the term is 0, whatever it is divided by
        denominator = self.denominator if index.numel() else None
        self._pass = _Pass(inputs, index, training, denominator)

    def _see_embeddings(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        current = self._pass
        if current is None:
            return
        anchor = self.config.anchor
        if callable(anchor):
            self._pass = None  # the function may call parts of the model
            with torch.no_grad():
                current.anchor = self._check_anchor(anchor(current.inputs), current)
            self._pass = current
        else:
            inputs = dict(zip(self._decoder_arguments, args, strict=False)) | kwargs
            if inputs.get("inputs_embeds") is not None:
                current.anchor = inputs["inputs_embeds"].detach()

    def _check_anchor(self, anchor: Any, current: _Pass) -> Tensor:
        expected = (current.index.numel(), self.config.anchor_features)
        if not isinstance(anchor, Tensor) or tuple(anchor.shape) != expected:
            came = tuple(anchor.shape) if isinstance(anchor, Tensor) else type(anchor).__name__
            raise ValueError(f"anchor: expected a Tensor of shape {expected}, got {came}")
        return anchor

    def _see_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return self._tap(layer, output)
        tapped = self._tap(layer, output[0])
        return None if tapped is None else (tapped, *output[1:])

    def _tap(self, layer: int, hidden: Tensor) -> Tensor | None:
        head, current, config = self.heads[layer], self._pass, self.config
        if current is None:
            # A checkpointed layer that backward runs again: bring back the tap's saved tensors,
            # and nothing else; the first run has counted the loss.
            if not torch.is_grad_enabled():
                return None
            nothing = hidden.new_zeros(0, dtype=torch.long)
            anchor = hidden.new_zeros(0, config.anchor_width(hidden.shape[-1]))
            return head.tap(hidden, anchor, visual_index=nothing)[0]
        if current.anchor is None:
            raise RuntimeError(
                f"PRe: layer {layer} runs, but the language model, "
                f"{self.family.language_model!r}, has not been called with inputs_embeds"
            )
        index, anchor = current.index.to(hidden.device), current.anchor.to(hidden.device)
        options = {"visual_index": index, "loss": config.loss, "normalize": config.normalize}
        value = torch.zeros((), dtype=torch.float32, device=hidden.device)
        current.values[layer] = value
        if not current.training:
            with torch.no_grad():
                value.copy_(head(hidden, anchor, **options))
            return None
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"PRe: layer {layer} runs without grad in a training step, as gradient "
                "checkpointing does with use_reentrant=True; expected use_reentrant=False "
                "(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        denominator = current.denominator
        if isinstance(denominator, Tensor):
            denominator = denominator.to(hidden.device)
        tapped, current.losses[layer] = head.tap(
            hidden,
            anchor,
            denominator=denominator,
            compute_value=config.value_in_forward,
            value_out=value,
            **options,
        )
        if config.value_in_forward:
            value.copy_(current.losses[layer].detach())
        return tapped

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current, self._pass = self._pass, None
        if current is None or output is None:  # the forward raised
            return None
        tokens = torch.tensor(float(current.index.numel()), device=current.index.device)
        is_tuple = isinstance(output, tuple)
        lm_loss = None
        if current.inputs.get("labels") is not None:
            lm_loss = output[0] if is_tuple else output.loss
        if current.training or current.index.numel():  # generation goes on without visual tokens
            detached = None if lm_loss is None else lm_loss.detach().clone()
            self._last = _Record(tokens, current.denominator, detached, current.values)
        if not current.training:
            return None
        values = [value.to(tokens.device) for value in current.losses.values()]
        term = torch.stack(values).mean() * self.config.weight * self._label_share(current)
        if lm_loss is None or not self.add_to_loss:
            self.loss = term
            return None
        total = lm_loss + term.to(lm_loss.device)
        if is_tuple:
            return (total, *output[1:])
        output.loss = total
        return output

    def _label_share(self, current: _Pass) -> float | Tensor:
        """This micro-batch's share of the step's label tokens.

        Where the caller gives the step's count (transformers' Trainer does under gradient
        accumulation, and then does not divide the loss), L_LM is a share of the step's mean: so
        must L_PRe be. `denominator` makes this exact, and the share is then not needed.
        """
        items = current.inputs.get("num_items_in_batch")
        labels = current.inputs.get("labels")
        if items is None or labels is None or current.denominator is not None:
            return 1.0
        return (labels[..., 1:] != -100).sum() / items
