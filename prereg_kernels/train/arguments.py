# SPDX-License-Identifier: Apache-2.0
"""Settings that other packages take: a wrong one is an error before anything is loaded."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Literal

from prereg_kernels._util.settings import shown

RESERVED = {
    "output_dir": "out",
    "remove_unused_columns": "nothing: batches are what the processor makes",
    "train_sampling_strategy": "nothing: batches are grouped by length and modality",
    "eval_strategy": "nothing: prereg evaluate does it",
    "load_best_model_at_end": "nothing: prereg evaluate does it",
    "save_only_model": "nothing: a run goes on from its checkpoints, with the optimizer's state",
    "resume_from_checkpoint": "nothing: a run goes on by itself, or starts anew with --fresh",
}
"""{field of TrainingArguments that the command sets: what to use in its place}"""


FSDP_KEYS = {
    "activation_checkpointing", "auto_wrap_policy", "backward_prefetch", "cpu_offload",
    "cpu_ram_efficient_loading", "forward_prefetch", "limit_all_gathers", "min_num_params",
    "reshard_after_forward", "state_dict_type", "sync_module_states",
    "transformer_layer_cls_to_wrap", "use_orig_params", "version", "xla", "xla_fsdp_grad_ckpt",
    "xla_fsdp_settings", "xla_fsdp_v2",
}  # fmt: skip
"""What transformers reads in fsdp_config (5.17); it ignores Accelerate's other names."""
_OF_ACCELERATE = {
    "offload_params": "cpu_offload",
    "sharding_strategy": "reshard_after_forward",
    "transformer_cls_names_to_wrap": "transformer_layer_cls_to_wrap",
    "mixed_precision_policy": "trainer.bf16",
}
"""{Accelerate's name: what does the same here}"""


def check_arguments(arguments: Mapping[str, Any], at: str) -> None:
    """Raise ValueError unless these are fields of TrainingArguments, of their types."""
    kinds = argument_types()
    for name, value in arguments.items():
        if name in RESERVED:
            raise ValueError(f"{at}.{name}: the command sets it; use {RESERVED[name]}")
        if name not in kinds:
            raise ValueError(f"{at}.{name}: unknown key; expected a field of TrainingArguments")
        if name == "fsdp_config" and isinstance(value, Mapping):
            _check_fsdp(value, f"{at}.{name}")
        allowed = kinds[name]
        if not allowed or (value is None and type(None) in allowed):
            continue
        is_number = isinstance(value, int) and not isinstance(value, bool) and float in allowed
        if type(value) not in allowed and not is_number:
            names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
            expected = " or ".join(names.get(kind, kind.__name__) for kind in sorted(
                allowed - {type(None)}, key=lambda kind: kind.__name__
            ))  # fmt: skip
            raise ValueError(f"{at}.{name}: expected {expected}, got {shown(value)}")


def _check_fsdp(settings: Mapping[str, Any], at: str) -> None:
    """Raise ValueError for a key that transformers does not know there, which it ignores."""
    for name, value in settings.items():
        plain = name.removeprefix("fsdp_")
        if plain == "offload_params" and value is False:
            continue  # in each file that `accelerate config` writes: it is so anyway
        if plain in _OF_ACCELERATE:
            raise ValueError(f"{at}.{name}: unknown key; use {_OF_ACCELERATE[plain]}")
        if plain not in FSDP_KEYS:
            raise ValueError(f"{at}.{name}: unknown key; expected one of {sorted(FSDP_KEYS)}")


@cache
def argument_types() -> dict[str, frozenset[type]]:
    """{field of TrainingArguments: the plain types that it takes; none where others may be}."""
    from transformers import TrainingArguments

    plain = (int, float, str, bool, type(None), list, dict)

    def leaves(hint: Any) -> frozenset[type] | None:
        origin = typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType):
            parts = [leaves(part) for part in typing.get_args(hint)]
            return None if None in parts else frozenset().union(*parts)  # type: ignore[arg-type]
        if origin is Literal:
            return frozenset(map(type, typing.get_args(hint)))
        kind = origin or hint
        if isinstance(kind, type) and issubclass(kind, str):  # enumerations are given as text
            return frozenset({str})
        return frozenset({kind}) if kind in plain else None

    hints = typing.get_type_hints(TrainingArguments)
    names = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    return {name: leaves(hints[name]) or frozenset() for name in names}


def check_quantization(settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless BitsAndBytesConfig takes them, which is silent about unknown keys."""
    from transformers import BitsAndBytesConfig

    known = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    for name in settings:
        if name not in known:
            raise ValueError(f"quantization.{name}: unknown key; expected one of {sorted(known)}")
    with suppress(ImportError):  # without bitsandbytes it is an error where a stage needs it
        try:
            made = BitsAndBytesConfig(**settings)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"quantization: {' '.join(str(error).split())}") from None
        if not (made.load_in_4bit or made.load_in_8bit):
            raise ValueError(
                "quantization: expected load_in_4bit: true or load_in_8bit: true, got "
                f"{shown(dict(settings))}"
            )


def check_lora(settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless PEFT's LoraConfig takes them."""
    with suppress(ImportError):  # without PEFT it is an error where a stage needs it
        from peft import LoraConfig

        try:
            LoraConfig(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"lora: {' '.join(str(error).split())}") from None
