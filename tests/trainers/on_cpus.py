# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed and FSDP on CPUs.

Accelerate (1.15) takes both up on accelerators alone: for DeepSpeed it has no backend without one,
and FSDP it leaves out. Here gloo is the backend of ranks without an accelerator, and FSDP is taken
up on CPUs; all else is Accelerate's own.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def install() -> None:
    """Put it into Accelerate."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # in place of cpu:0, where nothing can be loaded
    choose, make = PartialState._prepare_backend, AcceleratorState.__init__

    def prepare_backend(self: Any, cpu: bool = False, *args: Any) -> Any:
        is_rank = "LOCAL_RANK" in os.environ
        return ("gloo", DistributedType.MULTI_CPU) if is_rank else choose(self, cpu, *args)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        is_new = not AcceleratorState._shared_state
        make(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        is_asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or plugin
        if is_new and is_asked and self.distributed_type == DistributedType.MULTI_CPU:
            assert plugin is not None
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = plugin

    PartialState._prepare_backend, AcceleratorState.__init__ = prepare_backend, init
