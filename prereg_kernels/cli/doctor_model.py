# SPDX-License-Identifier: Apache-2.0
"""`prereg doctor MODEL`: whether PRe works on a model, and where the model keeps things.

The model is built from its config on the meta device, without weights. Then a smaller one of its
kind, with random weights, runs a made-up batch.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prereg_kernels._util.files import printable
from prereg_kernels._util.quiet import quiet
from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.handle import PRe
from prereg_kernels.attach.regularizer import apply_pre, remove_pre
from prereg_kernels.attach.resolver import Resolution, resolve
from prereg_kernels.checkup.model_files import (
    CODE,
    QUANTISED,
    in_words,
    naming,
    offline,
    read_content,
    without_code,
)
from prereg_kernels.cli.doctor import Report, show
from prereg_kernels.cli.made_up import check_batch
from prereg_kernels.cli.reduced import COUNTS, DEPTHS
from prereg_kernels.train.parts import modules_of, parts_of

MOST = 4096
"""Layers, or experts of a layer. A config with more would keep transformers busy for hours."""

# What transformers 4.57 has and its mappings lack: the names that its own save_pretrained writes,
CONFIGS = {
    "EvollaModel": "EvollaConfig",
    "lfm2-vl": "Lfm2VlConfig",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerConfig",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerConfig",
}
# and the classes of types that it lists elsewhere, or by another name.
CLASSES = {
    "EvollaModel": "EvollaForProteinText2Text",
    "instructblipvideo": "InstructBlipVideoForConditionalGeneration",
    "lfm2-vl": "Lfm2VlForConditionalGeneration",
    "phi4_multimodal": "Phi4MultimodalForCausalLM",
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
}


def doctor_model(directory: Path, as_json: bool) -> bool:
    """The command: prints the report, and returns whether PRe works on the model.

    Raises:
        ValueError: it is no model directory, or transformers cannot build a model of its config.
    """
    report, works = examine_model(directory)
    report = {name: {k: printable(v) for k, v in facts.items()} for name, facts in report.items()}
    print(json.dumps(report, indent=1) if as_json else show(report))
    return works


def examine_model(directory: Path) -> tuple[Report, bool]:
    """Facts by section, and whether PRe works on the model. ValueError as `doctor_model`."""
    with quiet(), offline(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check's own are told
        config, left_out = read_config(directory)
        kind = model_class(directory, config)
        model = _built(directory, kind, config)
        facts = {"class": kind.__name__, "model_type": config.model_type}
        if left_out:
            facts["left out"] = f"{', '.join(left_out)}: no code but transformers' own runs here"
        try:
            resolution = resolve(model)
            facts |= {"supported": "yes"} | _facts(model, resolution)
        except ValueError as error:
            return {"model": facts | {"supported": f"no: {error}"}}, False
        del model
        batch, works = check_batch(directory, kind, config)
    return {"model": facts, "batch": batch}, works


def _built(directory: Path, kind: Any, config: Any) -> nn.Module:
    """On the meta device. ValueError: transformers cannot."""
    try:
        with torch.device("meta"):
            model: nn.Module = kind(config)
    except Exception as error:
        raise ValueError(
            f"{directory / 'config.json'}: expected the config of a {kind.__name__}, and "
            f"transformers cannot build one of it: {in_words(error)}"
        ) from error
    return model


def read_config(directory: Path) -> tuple[Any, list[str]]:
    """The config of a model directory, and the keys left out of it. No code of it is run.

    Raises:
        ValueError: no config, or none of a type that transformers has.
    """
    import transformers
    from transformers import CONFIG_MAPPING, __version__

    content = read_content(directory)
    path, kind = directory / "config.json", content.get("model_type")
    if not isinstance(kind, str) or (kind not in CONFIG_MAPPING and kind not in CONFIGS):
        code = ", and the code that its auto_map names does not run here" * ("auto_map" in content)
        raise ValueError(
            f"{path}: expected a model_type of transformers {__version__}, got {kind!r}{code}. For "
            "a model from elsewhere say where things are, apply_pre(model, family=Family(...)), "
            "and call pre.check(batch)"
        )
    with naming(path):
        left_out: list[str] = []
        content = without_code(content, left_out, CODE | {QUANTISED})
        if kind in CONFIG_MAPPING:
            config = CONFIG_MAPPING[kind].from_dict(content)
        else:
            config = getattr(transformers, CONFIGS[kind]).from_dict(content)
        _check_counts(config.to_dict())
    return config, sorted(set(left_out) - {QUANTISED})


def model_class(directory: Path, config: Any) -> Any:
    """The class of transformers that is trained on images and text.

    Raises:
        ValueError: there is none for the config.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for names in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),  # from 5
        CLASSES,
        dict.fromkeys([config.model_type], next(iter(config.architectures or ()), "")),
    ):
        kind = getattr(transformers, str(names.get(config.model_type)), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    raise ValueError(
        f"{directory / 'config.json'}: expected the config of an image-text model, got model_type "
        f"{config.model_type!r}, of which transformers has none, and architectures "
        f"{config.architectures!r}"
    )


def _check_counts(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif name in (*DEPTHS, *COUNTS) and isinstance(value, int) and value > MOST:
            raise ValueError(f"{name}: expected at most {MOST}, got {value}")


def _facts(model: nn.Module, resolution: Resolution) -> dict[str, str]:
    """Where a model keeps what PRe needs, and which settings are possible on it."""
    family, how = resolution.family, resolution.how
    facts = {"family": f"{family.name}, {resolution.origin}"}
    for field in ("language_model", "layers"):
        facts[field] = how.get(field, getattr(family, field))
    by_mask = "by a mask that is made from the batch"
    facts["visual_tokens"] = how.get("visual_tokens", str(family.visual_tokens or by_mask))
    others = family.other_token_ids(model)
    facts["other_tokens"] = how.get("other_tokens", ", ".join(map(str, others)) or "none")
    count, entry = len(family.layers_of(model)), family.entry_of(model)
    if entry is not None:
        facts["enters_at"] = f"the visual features are first in the input of layer {entry + 1}"
    if family.streams is not None:
        facts["streams"] = f"several; PRe reads the {_words(family.streams)}"

    def of_default(pre: PRe) -> str:
        [(layer, head)] = pre.heads.items()
        parameters = sum(p.numel() for p in head.parameters())
        facts["layer"] = f"{layer}, the middle of {count}"
        facts["width"] = str(head.weights[0].shape[1])
        return f"{parameters:,} parameters, with the anchor {pre.config.anchor}"

    facts["head"] = _with(model, of_default)
    facts["level global"] = _with(
        model, lambda pre: f"possible, by {_counts(family)}", level="global"
    )
    facts["pre_projector"] = _with(
        model, lambda pre: f"possible, at {family.projector}", anchor="pre_projector"
    )
    facts["projector"] = _projector(model)
    return facts


def _projector(model: nn.Module) -> str:
    """Its modules, as PEFT's `modules_to_save` takes them."""
    modules = modules_of(model, parts_of(model)["projector"])
    if not modules:
        return "none that PEFT's modules_to_save takes"
    return f"{','.join(modules)}: beside LoRA it trains by modules_to_save"


def _with(model: nn.Module, fact: Callable[[PRe], str], **settings: Any) -> str:
    """A fact of PRe on the model with these settings, or why they are not possible."""
    try:
        pre = apply_pre(model, PReConfig(**settings))
    except ValueError as error:
        return f"not possible: {error}"
    try:
        return fact(pre)
    finally:
        remove_pre(model)


def _counts(family: Family) -> str:
    if family.images == "equal":
        return "an equal number of tokens for each image"
    return "the runs of visual tokens"


def _words(function: Any) -> str:
    return str(function.__name__).strip("_").replace("_", " ")
