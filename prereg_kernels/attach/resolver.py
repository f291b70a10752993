# SPDX-License-Identifier: Apache-2.0
"""Finds a model's decoder layers, what feeds them, and the ids of its visual tokens.

transformers' models say where their decoder is: `get_decoder`, or `get_encoder` if the images enter
a text encoder. They also say how many layers it has (`config.num_hidden_layers`), and of which
class (`_can_record_outputs`). The layers are the least nested list of that many modules in it. The
module that holds the list takes `inputs_embeds`. The ids are where the config of nearly every
family has them. The first steps check what was found (`prereg_kernels.attach.first_steps`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from torch import nn

from prereg_kernels._util import private
from prereg_kernels.attach.families import FAMILIES, family_of_type
from prereg_kernels.attach.family import Family, config_value
from prereg_kernels.attach.forward import parameters_of
from prereg_kernels.attach.stages import SAME_STAGE

Origin = Literal["given", "listed", "found"]
VISUAL_TOKENS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index",
    "vision_config.image_token_id", "vocabulary_map.<image>",
)  # fmt: skip
OTHER_TOKENS = ("audio_token_id", "audio_token_index", "audio_config.audio_token_id")
LISTS = ("layers", "h", "block", "blocks", "layer")  # what lists of decoder layers are called


class Resolution(NamedTuple):
    """A complete family, and how it is known.

    Attributes:
        family: as given or listed, and completed.
        origin: "given" by the caller, "listed" in the table, or "found" altogether.
        how: {field: what was found, and by what}, in order.
    """

    family: Family
    origin: Origin
    how: Mapping[str, str]


def resolve(model: nn.Module, given: Family | None = None) -> Resolution:
    """Find where a model keeps what PRe needs.

    Args:
        given: what the caller knows. None: the table's entry is completed, or all is found.

    Raises:
        ValueError: something cannot be found, the model wraps another one, or no visual token
            enters its decoder. The message says what to do.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    listed = None if given is not None else family_of_type(model_type)
    if listed is not None and listed.refused is not None:
        raise ValueError(f"model: {type(model).__name__} is not supported: {listed.refused}")
    if given is None and not _predicts_text(model):
        _refuse(model)
    origin: Origin = "given" if given is not None else "found" if listed is None else "listed"
    family = given or listed or Family(str(model_type or type(model).__name__))
    how: dict[str, str] = {}
    family = _complete_layers(model, family, how, given is not None)
    _check_nesting(model, family)
    return Resolution(_complete_tokens(model, family, how, given is not None), origin, how)


def find_family(model: nn.Module) -> Family:
    """The family of a model of transformers, complete. ValueError as `resolve`."""
    return resolve(model).family


def _complete_layers(model: Any, family: Family, how: dict[str, str], is_given: bool) -> Family:
    """The family with `layers` and `language_model`."""

    def unfound(problem: str, field: str = "layers") -> ValueError:
        return ValueError(_unfound(model, field, problem, is_given))

    if family.layers is None and family.language_model is None:
        if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
            raise ValueError(
                _unfound(model, "layers", "it has no config, or no get_decoder()", is_given)
            )
        decoder, call = _decoder_of(model)
        path = _path_of(model, decoder)
        if path is None:
            raise ValueError(
                _unfound(model, "layers", f"{call} is none of its submodules", is_given)
            )
        layers, why = _layers_in(model, decoder)
        if layers is None:
            raise ValueError(
                _unfound(model, "layers", f"{why} in {call}, {path or 'itself'}", is_given)
            )
        family = dataclasses.replace(family, layers=_path_of(model, layers))
        how["layers"] = f"{family.layers}: {len(layers)} {type(layers[0]).__name__}, by {call}"
    elif family.layers is None:
        layers, why = _layers_in(model, family.language_model_of(model))
        if layers is None:
            raise ValueError(f"family.layers: expected a path, as {why}; got None")
        family = dataclasses.replace(family, layers=_path_of(model, layers))
        how["layers"] = f"{family.layers}: {len(layers)} {type(layers[0]).__name__}"
    if family.language_model is None:
        assert family.layers is not None
        family.layers_of(model)
        path = family.layers.rpartition(".")[0]
        if not path or "inputs_embeds" not in parameters_of(model.get_submodule(path)):
            holder = type(model.get_submodule(path)).__name__
            problem = f"{holder}, which holds its decoder layers, takes no inputs_embeds"
            raise unfound(problem, "language_model")
        family = dataclasses.replace(family, language_model=path)
        how["language_model"] = f"{path}: it holds the layers and takes inputs_embeds"
    return family


def _check_nesting(model: Any, family: Family) -> None:
    """Raise ValueError unless the layers are where visual tokens go."""
    layers, language_model = family.layers_of(model), family.language_model_of(model)
    config = getattr(model, "config", None)
    inside = {f"family.language_model, {family.language_model!r}": language_model}
    if getattr(config, "is_encoder_decoder", False) and hasattr(type(model), "get_encoder"):
        encoder = _decoder_of(model)[0]
        inside[f"the encoder, {_path_of(model, encoder)!r}, which reads images"] = encoder
    for what, outer in inside.items():
        if all(module is not layers for module in outer.modules()):
            raise ValueError(
                f"family.layers: expected a list of layers inside of {what}; got {family.layers!r}"
            )
    counts = set(_layer_counts(config, language_model))
    for path, outer in model.named_modules():
        is_list = isinstance(outer, nn.ModuleList) and len(outer) in counts
        if is_list and str(family.layers).startswith(f"{path}."):
            raise ValueError(
                f"family.layers: expected the list of layers, as {path!r} is one of "
                f"{len(outer)}; got {family.layers!r}, in a layer"
            )


def _complete_tokens(model: Any, family: Family, how: dict[str, str], is_given: bool) -> Family:
    """The family with `visual_tokens` and `other_tokens`."""
    config = getattr(model, "config", None)
    if family.visual_tokens is None and family.visual_mask is None:
        names = token_names(config, VISUAL_TOKENS)
        if not names:
            expected = ", ".join(VISUAL_TOKENS)
            problem = (
                f"its config has no id of a visual token ({expected}); give the id itself, "
                "visual_tokens=(50,)"
            )
            raise ValueError(_unfound(model, "visual_tokens", problem, is_given))
        family = dataclasses.replace(family, visual_tokens=names)
        how["visual_tokens"] = ", ".join(f"{n} = {config_value(config, n)}" for n in names)
    others = token_names(config, OTHER_TOKENS)
    if others:
        how["other_tokens"] = ", ".join(f"{n} = {config_value(config, n)}" for n in others)
        family = dataclasses.replace(family, other_tokens=(*family.other_tokens, *others))
    visual, other = family.visual_token_ids(model), family.other_token_ids(model)
    both = sorted({*visual} & {*other})
    if both and "visual_tokens" not in how:
        raise ValueError(
            f"family.visual_tokens: expected none of the ids of other tokens with features, "
            f"{', '.join(map(str, family.other_tokens))}; got {', '.join(map(str, both))}"
        )
    return family


def token_names(config: Any, names: tuple[str, ...] = VISUAL_TOKENS) -> tuple[str, ...]:
    """The names under which the config has an id, one name for each id."""
    by_id: dict[int, str] = {}
    for name in names:
        value = config_value(config, name)
        if isinstance(value, int) and not isinstance(value, bool):
            by_id.setdefault(value, name)
    return tuple(by_id.values())


def is_pair(config: Any) -> bool:
    """Whether it is of an encoder of text and a decoder, whose labels are a text of their own."""
    configs = [config]
    if hasattr(config, "get_text_config"):
        configs.append(config.get_text_config(decoder=True))
    return any(getattr(each, "is_encoder_decoder", False) for each in configs)


def _decoder_of(model: Any) -> tuple[nn.Module, str]:
    """The module that `get_decoder` or `get_encoder` returns, and which of the two it was."""
    name = "get_encoder" if is_pair(model.config) else "get_decoder"
    module = model
    while hasattr(type(module), name):
        inner = getattr(module, name)()
        if inner is module:
            break
        module = inner
    return module, f"{name}()"


def _layers_in(model: Any, decoder: nn.Module) -> tuple[nn.ModuleList | None, str]:
    """The list of decoder layers; or None, and why not."""
    config = getattr(model, "config", None)
    counts = set(_layer_counts(config, decoder))
    if not counts:
        return None, "no config says how many layers there are"
    classes = _classes_of_layers(decoder)
    found = [
        (name.count("."), name.rpartition(".")[2] not in LISTS, name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in counts
        and (not classes or isinstance(module[0], classes))
    ]
    expected = " or ".join(map(str, sorted(counts)))
    if not found:
        lists = (x for x in decoder.modules() if isinstance(x, nn.ModuleList))
        some = max((sum(isinstance(y, classes) for y in x) for x in lists), default=0)
        stage = f", but one with {some} of them: {SAME_STAGE}" if some else ""
        return None, f"there is no list of {expected} layers{stage}"
    found.sort(key=lambda entry: entry[:2])
    if len(found) > 1 and found[0][:2] == found[1][:2]:
        names = ", ".join(name for *_, name, _ in found)
        return None, f"there are several lists of {expected} layers ({names})"
    return found[0][-1], ""


def _layer_counts(config: Any, decoder: Any) -> Iterator[int]:
    """How many layers the decoder has, by the config."""
    configs: list[Any] = [getattr(decoder, "config", None)]
    if hasattr(config, "get_text_config"):
        configs.append(config.get_text_config(decoder=True))
    for part in configs:
        text = part.get_text_config() if hasattr(part, "get_text_config") else part
        count = getattr(text, "num_hidden_layers", None)
        if isinstance(count, int):
            yield count


def _classes_of_layers(decoder: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes of the decoder's layers, by the outputs that transformers records; or ()."""
    recorded = (getattr(decoder, private.RECORDED_OUTPUTS, None) or {}).get("hidden_states")
    entries = recorded if isinstance(recorded, (list, tuple)) else [recorded]
    classes = [getattr(entry, "target_class", entry) for entry in entries]
    return tuple(c for c in classes if isinstance(c, type) and issubclass(c, nn.Module))


def _path_of(model: nn.Module, part: nn.Module) -> str | None:
    return next((name for name, module in model.named_modules() if module is part), None)


def _predicts_text(model: Any) -> bool:
    """Whether it is a model of transformers with a head; a wrapper passes on names alone."""
    needed = ("get_decoder", "get_output_embeddings")
    is_model = all(hasattr(type(model), name) for name in needed) and hasattr(model, "config")
    return is_model and model.get_output_embeddings() is not None


def _sees(model: Any) -> bool:
    """Whether a model with a head, of a type that is known or by its config, has visual tokens."""
    is_listed = family_of_type(model.config.model_type) is not None
    return is_listed or bool(token_names(model.config))


def _refuse(model: nn.Module) -> NoReturn:
    """Raise ValueError: there is a model within, or none."""
    for path, inner in model.named_modules():
        if inner is not model and _predicts_text(inner):
            name, inside = type(model).__name__, type(inner).__name__
            if not _sees(inner):
                problem = f"model.{path}, the {inside} in it, knows no visual token"
                raise ValueError(_unsupported(model, problem))
            raise ValueError(
                f"model: expected the {inside} itself, got a {name} around it; call "
                f"apply_pre(model.{path}), and do so before DistributedDataParallel, FSDP or "
                "torch.compile wrap it: they look at its parameters and hooks only once"
            )
    raise ValueError(_unsupported(model, "it has no head that predicts text"))


def _unfound(model: nn.Module, field: str, problem: str, is_given: bool) -> str:
    """The message for a part that is neither found nor in the family that the caller gave."""
    if is_given:
        return f"family.{field}: expected it to be given or to be found on the model, but {problem}"
    return _unsupported(model, problem)


def _unsupported(model: nn.Module, problem: str) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    types = [name for family in FAMILIES if not family.refused for name in family.model_types]
    return (
        f"model: {type(model).__name__} (model_type {model_type!r}) is not supported: {problem}. "
        "Expected an image-text model of transformers with a head that predicts text, or to be "
        "told where things are: from prereg_kernels import Family; apply_pre(model, "
        'family=Family("MyVLM", language_model="model.language_model", '
        'layers="model.language_model.layers", visual_tokens=("image_token_id",))). '
        f"Known model_types: {', '.join(types)}"
    )
