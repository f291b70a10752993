# SPDX-License-Identifier: Apache-2.0
"""A model directory's config and weights: read so that they load no code and no other files.

transformers takes more from a config.json than sizes. It fetches kernels from the hub that an
attention implementation names, asks at the terminal whether to run code that an `auto_map` names,
and builds parts of types that fetch their weights. `trust_remote_code=False` prevents the second
alone, and only in the outermost config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prereg_kernels._util import private
from prereg_kernels._util.files import printable, read_json
from prereg_kernels.checkup.images.layouts import check_tower, family_with_layout
from prereg_kernels.checkup.images.reading import SkipImage

CODE = {
    *private.IMPLEMENTATIONS, "auto_map", "attn_implementation", "experts_implementation",
    "use_kernels", "kernel_config", "fusion_config", "distributed_config", "transformers_weights",
}  # fmt: skip
"""Keys of a config that decide which code runs, and on which files; at any depth."""

ADAPTER = "adapter_config.json"
QUANTISED = "quantization_config"


def read_config(directory: Path) -> tuple[Any, list[str]]:
    """The config of a model directory, and the keys that were left out of it.

    Its attention is transformers' choice among its own: SDPA, or eager where a model lacks that.

    Raises:
        ValueError: no config, one of a family that the checkup does not know, one with parts of
            other types than it is tested with, or of quantised weights.
    """
    path, adapter = directory / "config.json", directory / ADAPTER
    if path.is_file() and adapter.exists():
        raise ValueError(
            f"{adapter}: expected a whole model, got an adapter beside it; merge it into the model "
            "first (merge_and_unload), or move it away to measure the model alone"
        )
    content = read_content(directory)
    kind = str(content.get("model_type"))
    with naming(directory):
        family_with_layout(kind)
    with naming(path):
        left_out: list[str] = []
        _check_dtype(content)
        content = without_code(content, left_out)
        return _built(kind, content), sorted(set(left_out))


def read_content(directory: Path) -> dict[str, Any]:
    """What a model directory's config.json says, as it is.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{directory}: expected a model directory, with a config.json in it"
            f"{_of_adapter(directory)}"
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _of_adapter(directory: Path) -> str:
    """What to do with a directory of an adapter; empty where it is none."""
    if not (directory / ADAPTER).exists():
        return ""
    base = ""
    with contextlib.suppress(ValueError, OSError):
        content = read_json(directory / ADAPTER)
        name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
        base = f" of {printable(name)}" * isinstance(name, str)
    return (
        f"; it is a LoRA adapter{base}: merge the adapter into its model first, "
        "PeftModel.from_pretrained(model, directory).merge_and_unload().save_pretrained(merged), "
        "and name the merged model's directory"
    )


def without_code(value: Any, left_out: list[str], names: Set[str] = CODE) -> Any:
    """A config's content without what decides which code runs; it adds to `left_out` what it was.

    Args:
        names: the keys to leave out, at any depth.
    """
    if isinstance(value, list):
        return [without_code(item, left_out, names) for item in value]
    if not isinstance(value, dict):
        return value
    left_out += [key for key in value if key in names and value[key] is not None]
    return {key: without_code(x, left_out, names) for key, x in value.items() if key not in names}


def check_weights(directory: Path, config: Any) -> None:
    """Raise ValueError unless each safetensors file is whole and they can be those of the config.

    Headers are read alone. A config that asks for more layers than there are tensors would keep
    transformers busy for hours.
    """
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{directory}: expected weights in *.safetensors files, got none")
    tensors = 0
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                tensors += len(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: expected a whole safetensors file: {error}") from None
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        for key in ("num_hidden_layers", "depth"):
            layers = getattr(part, key, 0)
            if isinstance(layers, int) and layers > tensors:
                raise ValueError(
                    f"{directory}: expected weights of {key} {layers}, as its config.json says, "
                    f"got {tensors} tensors"
                )


def _built(kind: str, content: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    free = CONFIG_MAPPING[kind].sub_configs["text_config"] is AutoConfig
    usual = CONFIG_MAPPING[kind]().get_text_config().model_type
    text = (content.get("text_config") or {}).get("model_type", usual)
    if free and text not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"text_config: expected a causal language model, got model_type {text!r}")
    config = CONFIG_MAPPING[kind].from_dict(content)
    check_tower(kind, config)
    return config


def _check_dtype(value: Any) -> None:
    """Raise ValueError where weights are quantised in a way that may need code of others."""
    for part in value if isinstance(value, list) else ():
        _check_dtype(part)
    if not isinstance(value, dict):
        return
    quantised = value.get(QUANTISED)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if method not in (None, "bitsandbytes"):  # the others' kernels may come from the hub
        raise ValueError(
            "quantization_config: expected weights in a floating dtype or of bitsandbytes, got "
            f"{method!r}; dequantise the model and save it first, or measure it by checkup()"
        )
    for part in value.values():
        _check_dtype(part)


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Errors of a library that reads it, as one ValueError that names the file or directory."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # panics of Rust's libraries are no Exceptions
        raise ValueError(f"{printable(path)}: {in_words(error)}") from error


def in_words(error: BaseException) -> str:
    """What an error says, in one line, with its type where that says more."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, SkipImage)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Without the hub, whatever asks for it."""
    from huggingface_hub import constants

    flags = [(constants, "HF_HUB_OFFLINE"), *private.copies_of_offline()]
    before = [getattr(module, name) for module, name in flags]
    try:
        for module, name in flags:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)
