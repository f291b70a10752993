# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers with PRe, at the paper's settings. For others: `with_pre(SFTTrainer, weight=0.3)`.

from prereg_kernels.trainers.trl import PReSFTTrainer

trainer = PReSFTTrainer("llava-hf/llava-1.5-7b-hf", args, train_dataset=..., peft_config=...)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trl

from prereg_kernels.trainers.attaching import with_pre

if TYPE_CHECKING:
    from trl import DPOTrainer as PReDPOTrainer
    from trl import GRPOTrainer as PReGRPOTrainer
    from trl import SFTTrainer as PReSFTTrainer

__all__ = ["PReDPOTrainer", "PReGRPOTrainer", "PReSFTTrainer"]


def __getattr__(name: str) -> Any:
    # Each when it is asked for: TRL's own modules import much, and not every version has all
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = with_pre(getattr(trl, name.removeprefix("PRe")))
    return made
