# SPDX-License-Identifier: Apache-2.0
"""The group of ranks that transformers' tensor parallelism made, on stand-ins of what it leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prereg_kernels import apply_pre
from prereg_kernels._util import private
from prereg_kernels._util.distributed import tensor_group, tensor_ranks
from prereg_kernels.attach.handle import state_of
from tests.tiny import tiny_llava


class Mesh:
    def __init__(self, *names: str) -> None:
        self.names, self.ndim = names, len(names)

    def __getitem__(self, name: str) -> Mesh:
        assert self.ndim > 1 and name in self.names
        return Mesh(name)

    def get_group(self) -> str:
        (name,) = self.names
        return f"ranks of {name}"


def model_of(mesh: Mesh | None, tp_size: int | None, of_config: int | None = None) -> Any:
    config = SimpleNamespace()
    if of_config is not None:
        config.distributed_config = SimpleNamespace(tp_size=of_config)
    return SimpleNamespace(config=config, tp_size=tp_size, **{private.DEVICE_MESH: mesh})


@pytest.mark.parametrize(
    "model",
    (
        model_of(Mesh("tp"), 2),
        model_of(Mesh("fsdp", "tp"), 2),
        model_of(Mesh("tp"), None, 2),  # as transformers 5.16 leaves it
    ),
)
def test_a_model_that_is_split(model: Any) -> None:
    assert tensor_group(model) == "ranks of tp"
    assert tensor_ranks(model) == 2  # where the group is turned off, too


@pytest.mark.parametrize(
    "model",
    (
        model_of(None, None),
        model_of(None, 2),  # no group to be had
        model_of(None, None, 2),  # a config that was saved by a model that was
        model_of(Mesh("fsdp"), None),
        model_of(Mesh("fsdp"), None, 1),
        model_of(Mesh("pp", "fsdp", "tp"), 1),
    ),
)
def test_a_model_that_is_not(model: Any) -> None:
    assert tensor_group(model) is None


def test_copies_where_the_sharing_is_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is on both ranks then, and figures count it once."""
    model = tiny_llava()
    pre = apply_pre(model)
    monkeypatch.setattr(type(model), "tp_size", None, raising=False)
    monkeypatch.setattr(model, private.DEVICE_MESH, Mesh("tp"), raising=False)
    of_config = SimpleNamespace(tp_size=2)
    monkeypatch.setattr(model.config, "distributed_config", of_config, raising=False)
    pre.tensor_parallel_group = None
    assert state_of(pre).copies == 2
