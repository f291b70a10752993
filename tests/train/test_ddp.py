# SPDX-License-Identifier: Apache-2.0
"""DDP beside gradient checkpointing: steps of text alone leave parameters without a gradient.

`tests.train.test_command.test_two_ranks_are_one` trains such steps on two ranks.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.training_args import ParallelMode

from prereg_kernels.train.config import TrainConfig, load_config
from prereg_kernels.train.engines import check_ddp
from prereg_kernels.train.run import training_arguments
from tests.train.places import settings, write

CHECKPOINTING: dict[str, Any] = {"trainer__gradient_checkpointing": True}
REENTRANT = {**CHECKPOINTING, "trainer__gradient_checkpointing_kwargs": {"use_reentrant": True}}
FIXED = {"trainer__ddp_find_unused_parameters": False}


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    return load_config(write(folder / "c.yaml", settings(folder, folder / "out", **changes)))


@pytest.mark.parametrize(
    ("changes", "finds", "is_reentrant"),
    [({}, True, None), (CHECKPOINTING, True, False), (REENTRANT, False, True),
     ({**CHECKPOINTING, **FIXED}, False, False)],
)  # fmt: skip
def test_what_ddp_is_told(
    tmp_path: Path, changes: dict[str, Any], finds: bool, is_reentrant: bool | None
) -> None:
    config = config_of(tmp_path, **changes)
    arguments = training_arguments(config, config.stages[1], tmp_path)
    assert arguments.ddp_find_unused_parameters is finds
    options = arguments.gradient_checkpointing_kwargs or {}
    assert options.get("use_reentrant") is is_reentrant


@pytest.mark.parametrize(
    ("changes", "message"),
    [(REENTRANT, "kwargs: expected use_reentrant: false on several ranks, .* got true"),
     (FIXED, "ddp_find_unused_parameters: expected true on several ranks, .* got false")],
)  # fmt: skip
def test_what_ddp_would_wait_for(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """An error before the first step; none of one process, of images alone, or under an engine."""
    config = config_of(tmp_path, **changes)
    own = training_arguments(config, config.stages[1], tmp_path)

    def check(mode: ParallelMode, *, leaves_out: bool = True, is_sharded: bool = False) -> None:
        arguments = SimpleNamespace(
            parallel_mode=mode,
            gradient_checkpointing=own.gradient_checkpointing,
            gradient_checkpointing_kwargs=own.gradient_checkpointing_kwargs,
            ddp_find_unused_parameters=own.ddp_find_unused_parameters,
        )
        trainer = SimpleNamespace(
            args=arguments, is_fsdp_enabled=is_sharded, is_deepspeed_enabled=False
        )
        check_ddp(trainer, leaves_out=leaves_out)

    with pytest.raises(ValueError, match=message):
        check(ParallelMode.DISTRIBUTED)
    check(ParallelMode.NOT_PARALLEL)
    check(ParallelMode.DISTRIBUTED, leaves_out=False)
    check(ParallelMode.DISTRIBUTED, is_sharded=True)
