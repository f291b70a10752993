"""A model directory, as the checkup needs it: weights, image processor, tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prereg_kernels.diagnostics.layouts import layout_of

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Loaded:
    """A model and what prepares its inputs.

    Attributes:
        model: in eval mode.
        processor: makes pixel values; always the Pillow variant, so that the numbers do not depend
            on whether torchvision is installed.
        tokenizer: None where the directory has none.
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
) -> Loaded:
    """Load a local model directory. Nothing is downloaded, and no code in it runs.

    Args:
        processor: another directory to take the image processor from.
        dtype: of the weights; None: as they are stored, but float32 on a CPU.

    Raises:
        ValueError: no such directory, a family or processor that is not supported, or weights that
            are missing, incomplete or not safetensors.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: expected a model directory, with a config.json in it")
    local = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(), _naming(directory):
        config = AutoConfig.from_pretrained(directory, **local)
    with _naming(directory):
        layout_of(config.model_type)
    if not any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory}: expected weights in *.safetensors files, got none")
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    with _quiet(), _naming(directory):
        model, found = AutoModelForImageTextToText.from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
    missing = sorted(found["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise ValueError(
            f"{directory}: expected weights of the whole model, {len(missing)} are missing, such "
            f"as {missing[0]}"
        )
    notes = []
    tokenizer = None
    if (directory / "tokenizer_config.json").is_file():
        with _quiet(), _naming(directory):
            tokenizer = AutoTokenizer.from_pretrained(directory, **local)
    else:
        notes.append(
            "There is no tokenizer in the model directory: tokens are shown as numbers, and "
            "images are put in without the words of a chat template before them."
        )
    image_processor, note = _image_processor(processor or directory, config)
    return Loaded(model.eval().to(device), image_processor, tokenizer, (*notes, *note))


def _image_processor(directory: Path, config: Any) -> tuple[Any, tuple[str, ...]]:
    """The directory's image processor, or, where it has none, the family's usual one and a note."""
    import transformers

    settings = _processor_settings(directory)
    note: tuple[str, ...] = ()
    if settings is None:
        name, settings = _usual_processor(config)
        note = (
            f"There is no image processor in {directory.name}: the family's usual one was used "
            f"({name}, {', '.join(f'{key} {value}' for key, value in settings.items())}). If the "
            "model was trained with another, name its directory with --processor.",
        )
    else:
        name = str(settings["image_processor_type"])
    kind = getattr(transformers, f"{name.removesuffix('Fast')}Pil", None)
    if not name.removesuffix("Fast").endswith("ImageProcessor") or kind is None:
        raise ValueError(
            f"{directory}: expected an image_processor_type of transformers that runs on Pillow, "
            f"got {name}"
        )
    kwargs = {k: v for k, v in settings.items() if k not in ("image_processor_type", "auto_map")}
    return kind(**kwargs), note


def _processor_settings(directory: Path) -> dict[str, Any] | None:
    for file in _PROCESSOR_FILES:
        path = directory / file
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            # newer checkpoints keep the image processor's settings inside the processor's
            settings = settings.get("image_processor", settings)
            if "image_processor_type" in settings:
                return dict(settings)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: expected the JSON of a processor: {error}") from None
    return None


def _usual_processor(config: Any) -> tuple[str, dict[str, Any]]:
    vision = config.vision_config
    if config.model_type.startswith("qwen"):
        return "Qwen2VLImageProcessor", {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }
    side = vision.image_size
    square = {"height": side, "width": side}
    if vision.model_type == "siglip_vision_model":
        return "SiglipImageProcessor", {"size": square}
    return "CLIPImageProcessor", {"size": {"shortest_edge": side}, "crop_size": square}


def process(processor: Any, image: Any) -> Mapping[str, Any]:
    """What the processor makes of one (H, W, 3) image, as tensors."""
    from transformers.image_utils import ChannelDimension

    # Said, not guessed: an image of three rows looks like one of three channels.
    result = processor([image], return_tensors="pt", input_data_format=ChannelDimension.LAST)
    return dict(result)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Errors of transformers, as one ValueError that names the directory."""
    try:
        yield
    except Exception as error:  # safetensors, OSError, KeyError of unknown model types, ...
        raise ValueError(f"{directory}: {' '.join(str(error).split())}") from error
