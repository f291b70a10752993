# SPDX-License-Identifier: Apache-2.0
"""Keyword arguments that a signature passes on are those of what it passes them to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from torch import Tensor
from typing_extensions import Unpack

import prereg_kernels
from prereg_kernels import PReConfig, fused_pre_loss, pre_tap
from prereg_kernels.attach.config import Settings
from prereg_kernels.ops.options import LossOptions, TapOptions
from prereg_kernels.trainers.attachment import AttachSettings


def test_settings_are_the_fields_of_the_config() -> None:
    hints = get_type_hints(PReConfig)
    assert get_type_hints(Settings) == {
        field.name: hints[field.name] for field in fields(PReConfig)
    }
    assert not Settings.__required_keys__


@pytest.mark.parametrize(
    "options, function", ((LossOptions, fused_pre_loss), (TapOptions, pre_tap))
)
def test_options_are_the_keyword_arguments(options: type, function: Callable[..., Tensor]) -> None:
    """But for the activation, which a head has."""
    hints: dict[str, Any] = get_type_hints(function)
    known = inspect.signature(function).parameters.values()
    names = {each.name for each in known if each.kind is each.KEYWORD_ONLY} - {"activation"}
    assert get_type_hints(options) == {name: hints[name] for name in names}
    assert not options.__required_keys__


def public_functions() -> Iterator[Callable[..., Any]]:
    """Those that the package exports, and the methods of its classes that are written there."""
    for name in prereg_kernels.__all__:
        exported = getattr(prereg_kernels, name)
        if inspect.isfunction(exported):
            yield exported
        elif inspect.isclass(exported):
            for member in vars(exported).values():
                function = member.fget if isinstance(member, property) else member
                if inspect.isfunction(function):
                    yield function


def test_hints_of_the_public_interface_are_there_at_run_time() -> None:
    """Tools that make forms or commands of a signature evaluate its annotations."""
    seen = {function.__qualname__: get_type_hints(function) for function in public_functions()}
    assert {"PRe.count", "PReHead.tap", "PReConfig.replace"} <= seen.keys()
    assert seen["apply_pre"]["overrides"] == Unpack[Settings]
    assert seen["with_pre"]["settings"] == Unpack[AttachSettings]
