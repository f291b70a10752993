# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a Trainer whose model has PRe: a plain model, and the heads beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from prereg_kernels._util import distributed, private
from prereg_kernels.attach.handle import PRe, find_pre, state_of
from prereg_kernels.attach.saving import heads_of
from prereg_kernels.attach.state import HEADS
from prereg_kernels.attach.storage import PRE_DIR
from prereg_kernels.trainers.weights import LossWeight

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)


class Checkpoints(_Base):
    """The part of PReTrainerMixin that saves the heads in `pre/` and reads them there.

    Under FSDP with sharded checkpoints, and under DeepSpeed, the heads are part of what these save
    and load. FSDP's checkpoint of a PeftModel is the exception: there they are in `pre/` beside it.
    """

    _read_from: str | None = None  # the checkpoint that is being read
    _loss_weight: LossWeight

    @property
    def pre(self) -> PRe:
        """The handle of PRe on the model."""
        return find_pre(self.model)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # A state dict is given where the parameters are sharded, and holds them whole; or nothing,
        # where DeepSpeed has them in files of its own. `save_pretrained` takes the heads out of it.
        heads = None if state_dict is None else heads_of(state_dict)
        super()._save(output_dir, state_dict)
        # The model's own `save_pretrained` writes its heads, on rank 0; a PeftModel's writes the
        # adapters alone.
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        written = inner is state_of(self.pre).model and not self.args.save_on_each_node
        # From transformers 5.24 all ranks come here; all have to save heads that are sharded
        is_sharded = any(map(distributed.is_sharded, state_of(self.pre).parameters().values()))
        if not written and heads != {} and (self.args.should_save or is_sharded):
            self.pre.save(Path(output_dir or self.args.output_dir) / PRE_DIR, heads)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._loss_weight.write(self.state)
        super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with self._reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self._heads_are_in_the_state():
            self.pre.load(Path(resume_from_checkpoint) / PRE_DIR)

    def _load_best_model(self) -> None:
        path = self.state.best_model_checkpoint
        with self._reading(path):
            super()._load_best_model()
        if self._heads_are_in_the_state():
            return
        if (Path(path) / PRE_DIR).is_dir():
            self.pre.load(Path(path) / PRE_DIR)
        else:  # as Trainer does for the model: another node has it
            logger.warning(f"Could not locate the heads of the best model at {path}/{PRE_DIR}")

    def _heads_are_in_the_state(self) -> bool:
        is_elsewhere = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return is_elsewhere and not self._heads_are_apart()

    def _heads_are_apart(self) -> bool:
        """FSDP's sharded checkpoints of a PeftModel hold the adapter alone (Accelerate 1.15)."""
        if not self.is_fsdp_enabled:
            return False
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
        return hasattr(inner, "peft_config") and "SHARDED" in kind

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Trainer's method; it writes the heads if nothing else does."""
        super().save_model(output_dir, *args, **kwargs)
        if self._heads_are_apart():  # on all ranks, which have a part of them each
            self.pre.save(Path(output_dir or self.args.output_dir) / PRE_DIR)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            bring_heads(Path(checkpoint_folder), Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        self._read_from = path
        try:
            yield
        finally:
            self._read_from = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer's method, without the names of the heads, which have their own file."""
        model = state_of(self.pre).model
        if load_result.unexpected_keys and self._read_from is not None:
            load_result = load_weights(model, self._read_from)
        ignored = getattr(model, private.IGNORED_ON_SAVE)
        missing = [name for name in load_result.missing_keys if f"{HEADS}." not in name]
        others = {name for name in ignored if f"{HEADS}." not in name}
        setattr(model, private.IGNORED_ON_SAVE, others)
        try:
            super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))
        finally:
            setattr(model, private.IGNORED_ON_SAVE, ignored)


def bring_heads(checkpoint: Path, output: Path) -> None:
    """Copy a checkpoint's heads to what Trainer pushes: it copies the files that it knows."""
    if (checkpoint / PRE_DIR).is_dir():
        shutil.copytree(checkpoint / PRE_DIR, output / PRE_DIR, dirs_exist_ok=True)


def load_weights(model: Any, path: str) -> Any:
    """Load a checkpoint's weights, as `from_pretrained` reads them.

    `save_pretrained` writes the names of the hub's checkpoints, which are not the modules' in most
    multimodal models; Trainer (5.17) looks for the modules', and leaves all else as it was.
    """
    own = (x for name, x in model.state_dict().items() if f"{HEADS}." not in name)
    dtypes = {x.dtype for x in own if x.is_floating_point()}
    widest = reduce(torch.promote_types, dtypes)  # so that nothing is rounded on the way
    with torch.random.fork_rng(devices=[]):
        read = type(model).from_pretrained(
            path,
            config=model.config,  # a file's may name code to fetch, as for attention
            dtype=widest,
            local_files_only=True,
        )
    return model.load_state_dict(read.state_dict(), strict=False)
