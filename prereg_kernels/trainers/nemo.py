# SPDX-License-Identifier: Apache-2.0
"""PRe in NeMo AutoModel: a mixin for its recipes, and its multimodal recipe with that mixin.

The recipe builds the model, shards it and makes the optimizer in one call. So the mixin attaches
PRe between building and sharding. The recipe computes its loss outside of the model, so backward
adds PRe's gradient by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its trl.py and axolotl.py are not the packages of these names

import torch
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.recipes.vlm import finetune
from torch import nn

from prereg_kernels._util import private
from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.handle import PRe, find_pre, state_of
from prereg_kernels.attach.state import HEADS
from prereg_kernels.attach.storage import PRE_DIR
from prereg_kernels.trainers.attachment import attach, check_settings, thaw
from prereg_kernels.trainers.frozen import warn_of_frozen_projector

if TYPE_CHECKING:
    from nemo_automodel.recipes.vlm.finetune import FinetuneRecipeForVLM as _Base
else:
    _Base = object

WHOLE = ("tp", "pp", "cp")  # dimensions of the device mesh
NOT_HERE = (
    "head_learning_rate", "head_weight_decay", "weight_schedule", "weight_warmup_steps",
    "gradient_ratio", "watch_steps",
)  # fmt: skip
BUILD = "apply_model_infrastructure"  # what loads weights, adapters and shards go through


class PReRecipeMixin(_Base):
    """Put it before a NeMo AutoModel recipe: `class MyRecipe(PReRecipeMixin, Recipe)`.

    - PRe's settings come from `pre:` in the YAML file, and from `pre_settings` of the class.
    - L_PRe is the mean over the visual tokens of a whole step, over all micro-batches and ranks.
      L_LM is the same mean over the labels.
    - The metrics have the step's "pre_loss" over all ranks, beside "loss", which stays L_LM.
    - A checkpoint's `model/` is the plain model or adapter. `pre/` beside it has the heads.

    Not supported: the heads' own learning rate and decay, weight schedules, watched gradients;
    tensor, pipeline, context and expert parallelism, MegatronFSDP.

    Attributes:
        pre: the handle of PRe on the model, once it is set up.
        pre_settings: settings as for `apply_pre`. Those of the file override them.

    Raises (by `setup`):
        TypeError, ValueError: a setting, or one of the above.
    """

    pre: PRe
    pre_settings: ClassVar[Mapping[str, Any]] = {}

    def setup(self) -> None:
        """The recipe's method; PRe is attached before sharding and before there is an optimizer."""
        given = self.cfg.get("pre", None)
        given = given.to_dict() if hasattr(given, "to_dict") else given or {}
        settings = {**self.pre_settings, **given}
        check_settings(settings)
        config = (settings.get("config") or PReConfig()).replace(
            **{name: settings[name] for name in NOT_HERE if name in settings}
        )
        for name in NOT_HERE:
            usual, value = getattr(PReConfig(), name), getattr(config, name)
            if value != usual:
                raise ValueError(
                    f"{name}: expected {usual!r} in NeMo AutoModel, where the optimizer has one "
                    f"group of parameters, and each step the same weight; got {value!r}"
                )
        with _before_sharding(settings):
            super().setup()

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        """The recipe's method, which `setup` calls at its end; it loads the heads, too."""
        self._check_parallelism()
        self.pre = find_pre(self.model_parts[0])
        self.pre.check()
        with _heads_apart(self.pre, in_files=True):
            super().load_checkpoint(restore_from)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The recipe's method; it saves the heads, too."""
        with _heads_apart(self.pre, in_files=True):
            super().save_checkpoint(*args, **kwargs)

    def _run_train_optim_step(self, batches: Any, *args: Any, **kwargs: Any) -> Any:
        """The recipe's method, a step of these micro-batches; it sets the step's denominator."""
        pre = self.pre
        rows = torch.stack([pre.count(batch) for batch in batches]).sum().cpu()
        rows = super()._dp_allreduce(rows)
        pre.denominator = max(int(rows), 1)  # on the host, as the recipe's count of labels
        # The recipe's own factor, as FSDP and DDP average over ranks
        pre.loss_scale = float(super()._get_dp_group_size(include_cp=True))
        self._sums: list[torch.Tensor] = []
        sample = super()._run_train_optim_step(batches, *args, **kwargs)
        mean = torch.stack(self._sums).sum().cpu() / pre.denominator
        sample.metrics["pre_loss"] = super()._dp_allreduce(mean).item()
        return sample

    def _forward_backward_step(self, *args: Any, **kwargs: Any) -> None:
        """The recipe's method, for a micro-batch."""
        super()._forward_backward_step(*args, **kwargs)
        record = state_of(self.pre).last
        if kwargs.get("is_train", True):
            assert record is not None and record.is_complete()
            self._sums.append(torch.stack(record.sums()).mean())

    def _check_parallelism(self) -> None:
        sizes = {name: getattr(self.mesh_context, f"{name}_size") for name in (*WHOLE, "ep")}
        split = [f"{name}_size={size}" for name, size in sizes.items() if size > 1]
        if split:
            raise ValueError(
                f"distributed: expected each rank to run the whole model on whole sequences, got "
                f"{', '.join(split)}; PRe in NeMo AutoModel takes data parallelism alone"
            )


class PReFinetuneRecipeForVLM(PReRecipeMixin, finetune.FinetuneRecipeForVLM):
    """NeMo AutoModel's multimodal recipe with PRe. A YAML file may name it as its `recipe:`."""


@contextmanager
def _before_sharding(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside this context, models that NeMo builds get PRe before they are sharded."""
    models = import_module(private.NEMO_MODELS)
    build: Callable[..., Any] = getattr(models, BUILD)

    @wraps(build)
    def with_pre(model: nn.Module, **kwargs: Any) -> Any:
        pre = attach(model, settings)
        is_meta = any(p.is_meta for head in pre.heads.values() for p in head.parameters())
        with _heads_apart(pre, in_files=False):  # the base model's files have none
            built = build(model=model, **kwargs)
        if is_meta:  # NeMo puts memory in their place, past the module
            for head in set(pre.heads.values()):
                head.reset_parameters()
        thaw(pre)  # which adapters have frozen
        warn_of_frozen_projector(pre)
        return built

    setattr(models, BUILD, with_pre)
    try:
        yield
    finally:
        setattr(models, BUILD, build)


@contextmanager
def _heads_apart(pre: PRe, in_files: bool) -> Iterator[None]:
    """Inside this context, NeMo writes and reads a model without heads.

    Args:
        in_files: these go to `pre/` beside its `model/`, and come from there.
    """
    save, load = Checkpointer.save_model, Checkpointer.load_model

    @wraps(save)
    def save_model(self: Any, model: Any, weights_path: str, *args: Any, **kwargs: Any) -> None:
        with _without_heads(pre):
            save(self, model, weights_path, *args, **kwargs)
        if in_files:
            pre.save(Path(weights_path) / PRE_DIR)

    @wraps(load)
    def load_model(self: Any, model: Any, model_path: str, *args: Any, **kwargs: Any) -> None:
        with _without_heads(pre):
            load(self, model, model_path, *args, **kwargs)
        if in_files:
            pre.load(Path(model_path).parent / PRE_DIR)

    Checkpointer.save_model, Checkpointer.load_model = save_model, load_model
    try:
        yield
    finally:
        Checkpointer.save_model, Checkpointer.load_model = save, load


@contextmanager
def _without_heads(pre: PRe) -> Iterator[None]:
    model = state_of(pre).model
    heads = getattr(model, HEADS)
    delattr(model, HEADS)
    try:
        yield
    finally:
        model.add_module(HEADS, heads)


def main() -> None:
    """Train. On several GPUs `automodel config.yaml` runs the recipe's file, and so this."""
    recipe = PReFinetuneRecipeForVLM(finetune.parse_args_and_load_config())
    recipe.setup()
    recipe.run_train_validation_loop()


if __name__ == "__main__":
    main()
