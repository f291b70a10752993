"""Keyword arguments that a signature passes on are those of what it passes them to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from torch import Tensor

from prereg_kernels import PReConfig, fused_pre_loss, pre_tap
from prereg_kernels.attach.config import Settings
from prereg_kernels.ops.options import LossOptions, TapOptions


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
