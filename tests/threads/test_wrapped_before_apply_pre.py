# SPDX-License-Identifier: Apache-2.0
"""I called apply_pre on a model that FSDP or DDP had already: each rank trains heads of its own.

Neither sees parameters that come later, so nothing averages their gradients. An error says to
attach PRe first: at once for FSDP, which marks the model, in the first step for DDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from prereg_kernels import apply_pre
from tests.tiny import make_batch, tiny_llava


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def whole(model: Any) -> Any:
    fully_shard(model)
    return model


def a_layer(model: Any) -> Any:
    fully_shard(model.model.language_model.layers[0])
    return model


def the_first_fsdp(model: Any) -> Any:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu")).module


def the_first_fsdp_within(model: Any) -> Any:
    layers = model.model.language_model.layers
    layers[0] = FullyShardedDataParallel(layers[0], device_id=torch.device("cpu"))
    return model


@pytest.mark.parametrize("shard", (whole, a_layer, the_first_fsdp, the_first_fsdp_within))
def test_fsdp(shard: Any) -> None:
    model = shard(tiny_llava())
    with pytest.raises(
        ValueError, match=r"model: expected one .*(C|c)all apply_pre\(model\) before"
    ):
        apply_pre(model)
    assert not hasattr(model, "pre_heads")


def test_ddp() -> None:
    model, batch = tiny_llava(), make_batch()
    wrapped = DistributedDataParallel(model)
    apply_pre(wrapped.module)
    with pytest.raises(ValueError, match="attached after DistributedDataParallel"):
        wrapped(**batch)
    with torch.no_grad():
        wrapped(**batch)


def test_in_the_right_order() -> None:
    model, batch = tiny_llava(), make_batch()
    pre = apply_pre(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        wrapped(**batch).loss.backward()
    assert pre.heads[2].weight_0.grad.norm() > 0
