# SPDX-License-Identifier: Apache-2.0
"""Towers in place of those that transformers takes from timm, which the tests do without."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tests.attach.families.models import WIDTH


class StubTower(nn.Module):
    """One convolution: images of 16 x 16 pixels to a map of 2 x 2, or to tokens in a row."""

    def __init__(self, layout: str = "map") -> None:
        super().__init__()
        assert layout in ("map", "tokens behind a class token")
        self.convolution = nn.Conv2d(3, WIDTH, 8, 8)
        self.layout = layout

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        features = self.convolution(pixel_values)
        if self.layout != "map":
            features = features.flatten(2).transpose(1, 2)
            features = torch.cat((features[:, :1], features), dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=features)


@contextmanager
def towers(model_type: str, tower: Callable[[], nn.Module]) -> Iterator[None]:
    """In here, models of that type are built with `tower()` where timm's would be."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    real = module.AutoModel.from_config

    def from_config(config: Any, *args: Any, **kwargs: Any) -> Any:
        if config.model_type in ("timm_wrapper", "gemma3n_vision"):
            return tower()
        return real(config, *args, **kwargs)

    with mock.patch.object(module, "AutoModel", SimpleNamespace(from_config=from_config)):
        yield
