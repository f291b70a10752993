# SPDX-License-Identifier: Apache-2.0
"""Attaches PRe to a trainer's model, by settings that were given before the model was there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prereg_kernels.attach.config import PReConfig, Settings
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.handle import PRe, get_pre
from prereg_kernels.attach.regularizer import apply_pre


class AttachSettings(Settings, total=False):
    """The keyword arguments of `apply_pre`."""

    config: PReConfig | None
    family: Family | None
    from_pretrained: str | Path | None


_NUMBERS = (
    "weight", "weight_warmup_steps", "gradient_ratio", "token_fraction", "head_learning_rate",
    "head_weight_decay",
)  # fmt: skip
_NOT_WRITTEN = ("config", "family")  # objects of Python


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, before there is a model, as `apply_pre` would later."""
    others = AttachSettings.__annotations__.keys() - Settings.__annotations__.keys()
    overrides: Any = {name: x for name, x in settings.items() if name not in others}
    if settings.get("from_pretrained") is None:
        (settings.get("config") or PReConfig()).replace(**overrides)


def read_settings(written: Any, name: str = "pre") -> AttachSettings:
    """The settings that a file or a command line has under this name, checked.

    Args:
        written: a mapping of plain values, as in YAML. None: no settings. A number may be text,
            because PyYAML reads 1e-3 as text.

    Raises:
        ValueError: it is no mapping, or a setting is unknown or wrong.
    """
    if written is None:
        return {}
    if not isinstance(written, Mapping):
        raise ValueError(f"{name}: expected settings such as {{weight: 0.5}}, got {written!r}")
    settings: Any = {n: _number(x) if n in _NUMBERS else x for n, x in written.items()}
    for setting in _NOT_WRITTEN:
        if setting in settings:
            raise ValueError(f"{name}.{setting}: expected it in Python, got {settings[setting]!r}")
    try:
        check_settings(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}.{error}") from None
    return settings


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # whose setting says what it expects


def attach(model: nn.Module, settings: Mapping[str, Any]) -> PRe:
    """The PRe that the model has already, or one attached by the settings.

    Raises:
        ValueError: the model has PRe, and there are settings.
    """
    pre = get_pre(model)
    if pre is None:
        return apply_pre(model, **settings)
    if settings:
        raise ValueError(
            "model: expected one without PRe, which is attached by the settings "
            f"{', '.join(settings)}; or no settings, which leave it as it is. remove_pre(model) "
            "takes it off"
        )
    return pre


def thaw(pre: PRe) -> None:
    """Let all heads train: PEFT freezes what it did not make."""
    for head in pre.heads.values():
        head.requires_grad_(True)
