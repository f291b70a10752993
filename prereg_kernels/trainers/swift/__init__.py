"""PRe in ms-swift (4.6): `swift sft --external_plugins $(prereg swift-plugin) ...`.

Settings are read where its other settings of a model come from: `--model_kwargs '{"pre": {"weight":
0.3}}'`, or `model_kwargs:` in its YAML file, which it puts into the environment, or the variable
PRE. For what a file cannot say, such as an anchor function, write a plugin of your own that calls
`register`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import yaml

from prereg_kernels.trainers.attaching import with_pre
from prereg_kernels.trainers.attachment import AttachSettings, check_settings, read_settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

VARIABLE = "PRE"
TASKS = ("causal_lm", "dpo")
_originals: dict[str, str] = {}
_settings: AttachSettings = {}


def register(**settings: Unpack[AttachSettings]) -> None:
    """Have ms-swift make its trainers with PRe.

    Args:
        settings: as `apply_pre` takes them; those of `model_kwargs` come before these.

    Raises:
        TypeError, ValueError: as `with_pre`; or it is the command `megatron`. When ms-swift makes
            its trainer: a setting of `model_kwargs`, or a task whose trainer goes without PRe.
    """
    from swift.trainers import TrainerFactory

    if "swift.megatron" in sys.modules:
        raise ValueError("megatron: expected the command swift with PRe, got megatron's trainers")
    check_settings(settings)
    _settings.update(settings)
    mapping = TrainerFactory.TRAINER_MAPPING
    for task, name in mapping.items():
        if not name.startswith(__name__):
            _originals[task] = name
            mapping[task] = f"{__name__}.{task}"


def __getattr__(name: str) -> Any:
    """The trainer's class of a task, as ms-swift looks it up."""
    if name not in _originals:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if name not in TASKS:
        raise ValueError(
            f"task_type or rlhf_type: expected one of {', '.join(TASKS)} with PRe, got {name}"
        )
    module, _, original = _originals[name].rpartition(".")
    written = read_settings(yaml.safe_load(os.environ.get(VARIABLE, "")), VARIABLE)
    settings: Any = {**_settings, **written}
    return with_pre(getattr(import_module(module), original), **settings)
