# SPDX-License-Identifier: Apache-2.0
"""PRe in ms-swift (4.6): `swift sft --external_plugins $(prereg swift-plugin) ...`.

Settings are read where its other settings of a model come from: the key "pre" of its
`model_kwargs`, which it puts into the environment, and so the variable PRE. For what a file cannot
say, such as an anchor function, write a plugin of your own that calls `register`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainingArguments
from typing_extensions import Unpack

from prereg_kernels._util.settings_file import parse
from prereg_kernels.attach.handle import find_pre
from prereg_kernels.attach.sequence_parallel import SequenceParallel
from prereg_kernels.attach.storage import PRE_DIR
from prereg_kernels.trainers.attaching import with_pre
from prereg_kernels.trainers.attachment import AttachSettings, check_settings, read_settings

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

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
    own = getattr(import_module(module), original)
    written = read_settings(parse(os.environ.get(VARIABLE, "")), VARIABLE)
    settings: Any = {**_settings, **written}
    return with_pre(type(own.__name__, (OfSwift, own), {}), **settings)


class OfSwift(_Base):
    """What a trainer of ms-swift's needs besides: it says how its ranks share sequences
    (`sequence_parallel_size`), and reads the heads of a checkpoint of which ms-swift has read the
    weights itself, and hides it from Trainer (`resume_only_model` with `ignore_data_skip`).

    Raises (when made):
        ValueError: ranks share sequences by ring attention.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args") or next(x for x in args if isinstance(x, TrainingArguments))
        checkpoint = given.resume_from_checkpoint
        super().__init__(*args, **kwargs)
        if checkpoint and not self.args.resume_from_checkpoint:
            find_pre(self.model).load(Path(checkpoint) / PRE_DIR)
        if self.template.sequence_parallel_size == 1:
            return
        from swift.sequence_parallel import sequence_parallel as ranks

        if ranks.rp_world_size > 1:
            raise ValueError(
                "sequence_parallel_size: expected a divisor of the model's key-value heads with "
                f"PRe, as more of them use ring attention; got {ranks.world_size}, and "
                f"{ranks.num_heads} heads"
            )

        def part_of(numbers: Tensor) -> Tensor:
            part: Tensor = ranks.split(ranks.pad(numbers, padding_value=0), dim=1)
            return part

        find_pre(self.model).sequence_parallel = SequenceParallel(ranks.sp_group, shard=part_of)
