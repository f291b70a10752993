# SPDX-License-Identifier: Apache-2.0
"""The model of a run, and its adapter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from prereg_kernels._util.files import printable
from prereg_kernels._util.supported import not_imported
from prereg_kernels.attach.resolver import find_family
from prereg_kernels.train.config import TrainConfig
from prereg_kernels.train.names import check_name
from prereg_kernels.train.parts import linear_of_llm, modules_of, parts_of

_ADAPTER = "adapter_config.json"  # PEFT's


def load_processor(path: str | Path) -> Any:
    """The model's own processor. Where torchvision is missing, one that takes videos takes none.

    Raises:
        ValueError: there is none, or it cannot be made here.
    """
    check_name("model", path)
    try:
        processor = _load_processor(path)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"model: no processor: {' '.join(str(error).split())}") from None
    if not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"model: expected a processor of text and images in {printable(path)}, got a "
            f"{type(processor).__name__}"
        )
    return processor


def _load_processor(path: str | Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(path)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
    from prereg_kernels.train.videoless import load_without_videos

    return load_without_videos(path)


def load_model(config: TrainConfig, path: str | Path, *, has_adapter: bool) -> nn.Module:
    """The model; quantized where an adapter trains in place of the LLM.

    Raises:
        ValueError: there is none.
    """
    arguments: dict[str, Any] = {"dtype": "auto", **config.model_arguments}
    if config.quantization is not None and has_adapter:
        whole = {"llm_int8_skip_modules": _outside_llm(model_on_meta(path))}
        arguments["quantization_config"] = BitsAndBytesConfig(**{**whole, **config.quantization})
    return load_whole(path, **arguments)


def load_whole(path: str | Path, **arguments: Any) -> Any:
    """The model in a directory or on the hub. An adapter, as QLoRA leaves it, is merged.

    transformers alone would read such an adapter without the projector beside it (5.17).

    Args:
        arguments: of `from_pretrained`.

    Raises:
        ValueError: there is none.
    """
    try:
        if not (Path(path) / _ADAPTER).is_file():
            return AutoModelForImageTextToText.from_pretrained(path, **arguments)
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
        model = AutoModelForImageTextToText.from_pretrained(base, **arguments)
        return PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"model: {' '.join(str(error).split())}") from None


def model_on_meta(path: str | Path) -> nn.Module:
    """The model by its config alone.

    Raises:
        ValueError: there is none.
    """
    check_name("model", path)
    try:
        settings = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model: nn.Module = AutoModelForImageTextToText.from_config(settings)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {' '.join(str(error).split())}") from None
    return model


def _outside_llm(model: nn.Module) -> list[str]:
    """The modules that stay whole when the LLM is quantized: their weights may have to train."""
    inside = set(linear_of_llm(model))
    return sorted(
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in inside
    )  # fmt: skip


def check_steps(model: nn.Module) -> None:
    """Raise ValueError where weights that train are float16: a GradScaler refuses them, and AdamW's
    epsilon is 0 there."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                "model: expected weights that can train, model_arguments: {dtype: float32}, got "
                f"float16 in {name}"
            )


def warn_of_steps(model: nn.Module) -> None:
    """Warn where weights that train are bfloat16: most steps of a small learning rate are lost."""
    sizes = [(p.dtype, p.numel()) for p in model.parameters() if p.requires_grad]
    narrow = sum(size for dtype, size in sizes if dtype == torch.bfloat16)
    advice = "set model_arguments: {dtype: float32}, and trainer.bf16: true for speed"
    if hasattr(model, "peft_config"):  # PEFT has the adapter itself in float32
        advice = (
            "they are those of modules beside the adapter; model_arguments: {dtype: float32} loses "
            "none, but doubles the memory of a bfloat16 model's frozen weights"
        )
    if narrow:
        warnings.warn(
            f"model: {narrow:,} of {sum(size for _, size in sizes):,} numbers that train are "
            f"bfloat16, which loses each step of less than 0.2% of a weight; {advice}",
            stacklevel=2,
        )


def with_adapter(model: nn.Module, lora: Mapping[str, Any], parts: Collection[str]) -> nn.Module:
    """The model in PEFT's, with LoRA on the LLM's linear layers; other parts train whole.

    Of the settings' `target_modules` those of the LLM are adapted: a name such as q_proj is one of
    many towers' modules, too. What `modules_to_save` names trains beside the other parts.

    Raises:
        ValueError: PEFT is not here, or does not take the settings.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        needs = "it needs: pip install peft"
        raise ValueError(f"lora: {not_imported(error, needs)}") from None
    by_part, parameters = parts_of(model), dict(model.named_parameters())
    others = {part: names for part, names in by_part.items() if part != "llm"}
    modules = modules_of(model, [n for part in parts if part != "llm" for n in by_part[part]])
    frozen = [parameters[n] for part in others if part not in parts for n in others[part]]
    settings = {"task_type": "CAUSAL_LM", "target_modules": linear_of_llm(model), **lora}
    if modules:
        settings["modules_to_save"] = [*modules, *(lora.get("modules_to_save") or ())]
    outside = modules_of(model, [name for names in others.values() for name in names])
    settings["exclude_modules"] = _excluding(outside, lora.get("exclude_modules"))
    try:
        with warnings.catch_warnings():
            if not lora.get("exclude_modules"):  # nobody has: it is ours
                warnings.filterwarnings("ignore", message="You have passed exclude_modules")
            peft: Any = get_peft_model(model, LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {' '.join(str(error).split())}") from None
    for written in peft.peft_config.values():
        base = written.base_model_name_or_path
        if base and Path(base).is_dir():  # so that it is found from other folders too
            written.base_model_name_or_path = str(Path(base).resolve())
    for parameter in frozen:
        parameter.requires_grad_(False)  # which bias: all lets train
    result: nn.Module = peft
    return result


def _excluding(modules: Collection[str], given: str | Collection[str] | None) -> str:
    """PEFT's pattern of what no adapter goes on: what is in these modules, and what is given."""
    patterns = [rf"(?:{re.escape(path)})(?:\..*)?" for path in modules]
    if isinstance(given, str):
        patterns.append(given)
    elif given:
        patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in given]
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def visual_ids(model: nn.Module) -> frozenset[int]:
    """The ids that stand for images and videos."""
    return frozenset(find_family(model).visual_token_ids(model))


def without_adapter(model: Any) -> Any:
    """The model itself, where this is PEFT's around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def describe(model: nn.Module) -> dict[str, int]:
    """{"parameters", "trainable"}: how many numbers."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(count for count, _ in counts),
        "trainable": sum(count for count, trains in counts if trains),
    }
