# SPDX-License-Identifier: Apache-2.0
"""PRe in axolotl: add two entries to its YAML file, and run `axolotl train x.yml` as before.

plugins: [prereg_kernels.trainers.axolotl.PRePlugin]
pre: {weight: 0.3}  # as `apply_pre` takes them; may be left out
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.import_helper import get_cls_from_module_str
from pydantic import BaseModel, Field, field_validator
from transformers.integrations import is_deepspeed_zero3_enabled

from prereg_kernels.attach.handle import find_pre
from prereg_kernels.attach.storage import PRE_DIR
from prereg_kernels.trainers.attaching import with_pre
from prereg_kernels.trainers.attachment import read_settings
from prereg_kernels.trainers.trainer import PReTrainerMixin

if TYPE_CHECKING:
    from torch import nn

OTHERS = ("rl", "reward_model", "process_reward_model")
"""What axolotl (0.19) trains on text alone, even of a multimodal model."""


class PReArgs(BaseModel):
    """The settings that the plugin adds to axolotl's.

    Attributes:
        pre: as `apply_pre` takes them.
    """

    pre: dict[str, Any] = Field(default_factory=dict)

    @field_validator("pre", mode="before")
    @classmethod
    def check(cls, written: Any) -> dict[str, Any]:
        """The settings, checked; nothing at all is no settings."""
        return dict(read_settings(written))


class PRePlugin(BasePlugin):
    """Trains with PRe: it passes axolotl's trainer class, or another plugin's, through `with_pre`.

    Each checkpoint has the heads in `pre/`, and so has the output directory at the end.

    Raises (when a trainer is made):
        ValueError: this kind of training reads no images, or a plugin before this one has a
            trainer of its own.
    """

    def get_input_args(self) -> str:
        """The name of the settings' model."""
        return f"{__name__}.{PReArgs.__name__}"

    def get_trainer_cls(self, cfg: Any) -> type[Any]:
        """The class that axolotl would take, with PRe."""
        for name in OTHERS:
            if cfg[name]:
                raise ValueError(
                    f"{name}: expected none with PRePlugin, as axolotl trains it on text alone; "
                    f"got {cfg[name]}"
                )
        return with_pre(self._trainer(cfg), **read_settings(cfg.pre))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Check that axolotl took that class: it takes the first that a plugin names."""
        if not isinstance(trainer, PReTrainerMixin):
            raise ValueError(
                "plugins: expected PRePlugin before those that have a trainer of their own, got "
                f"{', '.join(cfg.plugins)}, of which axolotl takes {type(trainer).__name__}"
            )

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        """Write the heads beside the last adapter, whose own file has none."""
        is_partitioned = cfg.fsdp_config or is_deepspeed_zero3_enabled()
        if cfg.adapter and cfg.local_rank == 0 and not is_partitioned:
            find_pre(model).save(Path(cfg.output_dir) / PRE_DIR)

    def _trainer(self, cfg: Any) -> type[Any]:
        for other in PluginManager.get_instance().plugins.values():
            found = None if other is self else other.get_trainer_cls(cfg)
            if found is not None:
                return found
        return get_cls_from_module_str(cfg.trainer_cls) if cfg.trainer_cls else AxolotlTrainer
