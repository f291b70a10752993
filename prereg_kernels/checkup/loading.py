# SPDX-License-Identifier: Apache-2.0
"""A model directory, as the checkup needs it: weights, image processor, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prereg_kernels._util.files import read_json
from prereg_kernels._util.quiet import quiet
from prereg_kernels.checkup.images.layouts import family_with_layout
from prereg_kernels.checkup.images.processing import make, pillow_class, place
from prereg_kernels.checkup.model_files import (
    QUANTISED,
    check_weights,
    naming,
    offline,
    read_config,
)

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_NORMALISES = ("image_mean", "image_std")
_TEMPLATE_FILE = "chat_template.json"


@dataclass(frozen=True)
class Prepared:
    """What prepares a model's inputs.

    Attributes:
        config: the model's.
        processor: makes pixel values; always the Pillow variant, so that the numbers do not depend
            on whether torchvision is installed.
        tokenizer: None where the directory has none.
        notes: what a reader of the numbers should know about them.
    """

    config: Any
    processor: Any
    tokenizer: Any
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """A model and what prepares its inputs.

    Attributes:
        model: in eval mode.
        processor, tokenizer: as in Prepared.
        notes: what a reader of the numbers should know about how it was loaded.
    """

    model: nn.Module
    processor: Any
    tokenizer: Any
    notes: tuple[str, ...]

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config


def load(
    directory: Path,
    *,
    processor: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    bits: int | None = None,
) -> Loaded:
    """Load a local model directory. Nothing is downloaded, and no code in it runs.

    Args:
        processor: another directory to take the image processor from.
        dtype: of the weights; None: as they are stored, but float32 on a CPU.
        device_map: how accelerate spreads the layers over devices, such as "auto"; instead of
            `device`.
        bits: 4 or 8: bitsandbytes rounds the weights of the linear layers as they are loaded.

    Raises:
        ValueError: no such directory, a family or processor that is not supported, or weights that
            are missing, incomplete or not safetensors.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    prepared = prepare(directory, processor)
    config = prepared.config
    check_weights(directory, config)
    local = {"config": config, "local_files_only": True, "trust_remote_code": False}
    if dtype is None and device_map is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    placed: dict[str, Any] = {}
    if device_map is not None or bits is not None:
        placed["device_map"] = device_map or {"": device}
    if bits is not None:
        placed["quantization_config"] = _rounded(directory, config, bits, dtype)
    with quiet(), offline(), naming(directory):
        model, loading = AutoModelForImageTextToText.from_pretrained(
            directory,
            generation_config=GenerationConfig(),  # else its file is read as well
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **placed,
            **local,
        )
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise ValueError(
            f"{directory}: expected weights of the whole model, {len(missing)} are missing, such "
            f"as {missing[0]}"
        )
    notes = prepared.notes
    if bits is not None:
        rounded = f"Loaded in {bits} bits by bitsandbytes: the numbers are of rounded weights."
        notes = (*notes, rounded)
    model.eval()
    if not placed:
        with naming(directory):
            model.to(device)
    return Loaded(model, prepared.processor, prepared.tokenizer, notes)


def prepare(directory: Path, processor: Path | None = None) -> Prepared:
    """What prepares the inputs of the model in a directory, whose weights are not read.

    Args, Raises: as `load`.
    """
    config, left_out = read_config(directory)
    notes = [
        f"{', '.join(left_out)} in config.json may name code, and was left out: attention and "
        "everything else are transformers' own."
    ] * bool(left_out)
    tokenizer = _tokenizer(directory, config)
    if tokenizer is None:
        notes.append(
            "There is no tokenizer in the model directory: tokens are shown as numbers, and "
            "images are put in without the words of a chat template before them."
        )
    elif not tokenizer.chat_template:
        notes.append(
            "There is no chat template in the model directory: images are put in without its words "
            "before them."
        )
    if processor is not None and _processor_settings(processor)[1] is None:
        raise ValueError(
            f"{processor}: expected an image processor, {' or '.join(_PROCESSOR_FILES)}, got none"
        )
    image_processor, note = _image_processor(processor or directory, config)
    return Prepared(config, image_processor, tokenizer, (*notes, *note))


def _tokenizer(directory: Path, config: Any) -> Any:
    """The directory's, or None. Its chat template may be in the processor's file of old."""
    from transformers import AutoTokenizer

    if not (directory / "tokenizer_config.json").is_file():
        return None
    with quiet(), offline(), naming(directory):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, config=config, local_files_only=True, trust_remote_code=False
        )
    path = directory / _TEMPLATE_FILE
    if not tokenizer.chat_template and path.is_file():
        content = read_json(path)
        template = content.get("chat_template") if isinstance(content, dict) else None
        if not isinstance(template, str):
            raise ValueError(f"{path}: expected an object with a chat_template, got {template!r}")
        tokenizer.chat_template = template
    return tokenizer


def _rounded(directory: Path, config: Any, bits: int, dtype: torch.dtype | None) -> Any:
    """What transformers takes to load in so many bits."""
    from transformers import BitsAndBytesConfig

    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    if getattr(config, QUANTISED, None) is not None:
        raise ValueError(
            f"{directory}: expected weights of a floating dtype to round to {bits} bits"
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


def _image_processor(directory: Path, config: Any) -> tuple[Any, tuple[str, ...]]:
    """The directory's image processor, or, where it has none, the family's usual one and a note."""
    path, settings = _processor_settings(directory)
    note: tuple[str, ...] = ()
    if settings is None:
        usual = family_with_layout(config.model_type).processor
        if usual is None:
            raise ValueError(
                f"{directory}: expected an image processor, {' or '.join(_PROCESSOR_FILES)}, got "
                "none; name another directory with --processor"
            )
        with naming(directory / "config.json"):
            name, settings = usual(config)
    else:
        name = str(settings["image_processor_type"])
    kind = pillow_class(name)
    if kind is None:
        raise ValueError(
            f"{path}: expected an image_processor_type of transformers that runs on Pillow, "
            f"got {name}"
        )
    kwargs = {k: v for k, v in settings.items() if k not in ("image_processor_type", "auto_map")}
    with naming(path):
        made = make(kind, kwargs)
        if path == directory:  # it has none
            facts = {key: getattr(made, key) for key in (*kwargs, *_NORMALISES)}
            note = (
                f"There is no image processor in {directory.name}: the family's usual one was used "
                f"({name}, {', '.join(f'{key} {value}' for key, value in facts.items())}). If the "
                "model was trained with another, name its directory with --processor.",
            )
        place(config, made, np.zeros((64, 64, 3), dtype=np.uint8))  # what fails always fails here
    return made, note


def _processor_settings(directory: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file with an image processor's settings, and those; the directory where there is none."""
    for file in _PROCESSOR_FILES:
        path = directory / file
        if not path.is_file():
            continue
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: expected the JSON of a processor, got {settings!r:.40}")
        # newer checkpoints keep the image processor's settings inside the processor's
        settings = settings.get("image_processor", settings)
        if isinstance(settings, dict) and "image_processor_type" in settings:
            return path, settings
    return directory, None
