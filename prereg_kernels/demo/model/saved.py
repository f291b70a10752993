# SPDX-License-Identifier: Apache-2.0
"""The model of a checkpoint: written as a plain Hugging Face directory, and read back whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from prereg_kernels._util.files import printable
from prereg_kernels._util.quiet import quiet
from prereg_kernels.demo.checkpoints.checkpoint import CheckpointError
from prereg_kernels.demo.checkpoints.manifest import check_files, read_manifest
from prereg_kernels.demo.config import RunConfig
from prereg_kernels.demo.data.packing import build_tokenizer, image_processor
from prereg_kernels.demo.model.llava import build_model

# What the settings of scenes and model say of a model's config, where shapes need not tell.
_OF_SCENES = (
    "image_token_id", "image_seq_length", "text_config.vocab_size", "vision_config.image_size",
    "vision_config.patch_size", "vision_feature_layer", "vision_feature_select_strategy",
)  # fmt: skip
_OF_MODEL = tuple(
    f"{part}_config.{name}"
    for part in ("text", "vision")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "hidden_act")
)  # fmt: skip


def load_model(
    path: str | Path, *, attention: str = "sdpa", own: bool = False
) -> LlavaForConditionalGeneration:
    """The fp32 model of a checkpoint directory, without PRe, in eval mode.

    Args:
        own: it is what a run goes on from: its files are checked already, and hold fp32.

    Raises:
        CheckpointError: there is no such model, or a part of it is missing or damaged.
    """
    try:
        listed = None if own else read_manifest(Path(path))
        if listed is not None:
            check_files(Path(path), listed, set())
        _check_dtypes(Path(path), ("F32",) if own else ("F64", "F32", "F16", "BF16"))
        with quiet():
            model, found = LlavaForConditionalGeneration.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
    except Exception as error:  # transformers and safetensors raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"could not load a model from {printable(path)}: {reason}") from error
    for what in ("missing", "unexpected", "mismatched"):
        if names := found[f"{what}_keys"]:
            ordered = sorted(name if isinstance(name, str) else name[0] for name in names)
            shown = ", ".join(ordered[:3]) + ", ..." * (len(names) > 3)
            raise CheckpointError(
                f"could not load a model from {printable(path)}: {len(names)} {what} tensors: "
                f"{printable(shown)}"
            )
    return model


def check_model(model: LlavaForConditionalGeneration, config: RunConfig, path: str | Path) -> None:
    """Raise CheckpointError unless a model that was read fits a run's settings."""
    with torch.device("meta"):
        wanted = build_model(config.model, config.scenes, build_tokenizer(config.scenes), 0).config
    for name in _OF_SCENES + (() if config.init_from is not None else _OF_MODEL):
        *inside, field = name.split(".")
        theirs, ours = model.config, wanted
        for part in inside:
            theirs, ours = getattr(theirs, part), getattr(ours, part)
        if getattr(theirs, field, None) != getattr(ours, field):
            raise CheckpointError(
                f"{printable(path)}/config.json: {name} is {getattr(theirs, field, None)!r}, "
                f"expected {getattr(ours, field)!r} by the run's settings"
            )


def model_writer(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> Callable[[Path], None]:
    """Writes the model, its tokenizer and, where PRe is attached, its heads."""

    def write(directory: Path) -> None:
        with quiet():
            model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        image_processor(model.config.vision_config.image_size).save_pretrained(directory)

    return write


def _check_dtypes(path: Path, expected: tuple[str, ...]) -> None:
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                dtype = opened.get_slice(name).get_dtype()
                if dtype not in expected:
                    raise ValueError(f"{file.name}: {name} is {dtype}, expected {expected}")
