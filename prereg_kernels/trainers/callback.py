# SPDX-License-Identifier: Apache-2.0
"""PReCallback: PRe in a trainer whose class you cannot choose, but which takes callbacks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from typing_extensions import Unpack

from prereg_kernels.attach.handle import PRe, get_pre, state_of
from prereg_kernels.attach.parameter_groups import has_own
from prereg_kernels.attach.storage import PRE_DIR
from prereg_kernels.trainers.attachment import AttachSettings, attach, check_settings, thaw
from prereg_kernels.trainers.checkpoints import bring_heads
from prereg_kernels.trainers.frozen import warn_of_frozen_projector
from prereg_kernels.trainers.optimizers import check_optimizer, set_heads_apart
from prereg_kernels.trainers.weights import begin_step, is_scheduled

logger = logging.get_logger(__name__)
STATE = "trainer_state.json"  # of a checkpoint


class PReCallback(TrainerCallback):
    """Attaches PRe to the model of a transformers Trainer when the trainer is made.

    If you can choose the trainer's class, `with_pre` does more. The callback has these limits:

    - L_PRe. As with a plain Trainer, each micro-batch's mean is weighted by its share of the
      labels. That is exact if it is also the share of the visual tokens. The log says so once.
    - Losses that are computed outside of the model, as TRL's are, need `gradient="tap"`.
    - Logs. "pre_loss" and "lm_loss" are those of the last micro-batch. If `watch_steps` has
      watched the step, so are the norms of both gradients. They are in `log_history` and reach the
      callbacks after this one. Trainer's own reports, such as to TensorBoard, come before it.
    - Saving. Beside an adapter, checkpoints have `pre/` with the heads, and so has the output
      directory at the end of training, unless `save_strategy` is "no". `save_model` to another
      directory writes none; call `callback.pre.save`.
    - Resuming. The heads come back from `pre/` in the checkpoint. The checkpoint has to be in the
      output directory, or in `TrainingArguments(resume_from_checkpoint=...)`; otherwise it is an
      error. For most multimodal models Trainer (5.17) restores no weight, and says so in a
      warning. `load_best_model_at_end` leaves the last heads.
    - The trainer must not make another model (`model_init`), or have an optimizer beforehand.
      `head_learning_rate` and `head_weight_decay` need an optimizer of `pre.parameter_groups`.

    In a PReTrainer the callback attaches PRe, and the trainer does the rest. Under FSDP and
    DeepSpeed the heads are part of what these save and load.

    Attributes:
        pre: the handle; None before there is a trainer.

    Raises (in training):
        ValueError: one of the above.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> callback = PReCallback(weight=0.3)
        >>> arguments = TrainingArguments("out", use_cpu=True, report_to="none")
        >>> trainer = Trainer(model, arguments, callbacks=[callback])
        >>> callback.pre.config.weight
        0.3
    """

    def __init__(self, **settings: Unpack[AttachSettings]) -> None:
        check_settings(settings)
        self._settings = settings
        self.pre: PRe | None = None
        self.is_alone = True  # no PReTrainer does the rest

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Attach PRe to the model."""
        self.pre = attach(model, self._settings)
        thaw(self.pre)
        warn_of_frozen_projector(self.pre)

    def on_train_begin(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that the heads will train, and continue with the heads of a checkpoint."""
        pre = get_pre(model)
        if self.pre is None:
            raise ValueError(
                "PReCallback: expected it in callbacks= when the trainer is made, where it "
                "attaches PRe before there is an optimizer; got it by add_callback"
            )
        if pre is None or pre is not self.pre:
            raise ValueError(
                "model: expected the one that the trainer was made with, got another, as "
                "model_init makes one for each run; attach PRe in it, by apply_pre"
            )
        pre.check()
        if not self.is_alone:
            return
        if not _is_partitioned(args):
            check_optimizer(optimizer, model)
        if pre.config.gradient_ratio is not None:
            raise ValueError(
                "gradient_ratio: PReCallback does not see the gradients of all of a step; use "
                f"with_pre(TrainerClass); expected None, got {pre.config.gradient_ratio}"
            )
        if has_own(pre.config):
            set_heads_apart(optimizer, state_of(pre), is_given=True)
        if args.gradient_accumulation_steps > 1 or args.world_size > 1:
            logger.warning_once(
                "PReCallback: L_PRe of a step is the mean over its micro-batches' means, weighted "
                "by their labels; prereg_kernels.trainers.with_pre(TrainerClass) makes it the mean "
                "over all visual tokens of the step"
            )
        counts = getattr(args, "average_tokens_across_devices", False)
        state_of(pre).item_ranks = args.world_size // state_of(pre).copies if counts else 1
        if state.global_step and not _is_partitioned(args):
            pre.load(_checkpoint_of(args, state) / PRE_DIR)

    def on_train_end(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the heads to the output directory beside an adapter, which `save_model` writes."""
        if not self.is_alone:
            return
        assert self.pre is not None
        state_of(self.pre).item_ranks = None  # of this trainer's steps
        if args.should_save and args.save_strategy != "no" and self._are_apart(args, model):
            self.pre.save(Path(args.output_dir) / PRE_DIR)

    def on_step_begin(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the weight, and whether the step is watched."""
        if self.is_alone:
            assert self.pre is not None
            begin_step(self.pre, state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Put the figures beside Trainer's regular ones."""
        # By these two, as others log as well, and not always on all ranks.
        if not self.is_alone or "loss" not in logs or "learning_rate" not in logs:
            return
        assert self.pre is not None
        metrics = self.pre.metrics().items()
        figures = {n: x for n, x in metrics if n not in ("visual_tokens", "images")}
        if is_scheduled(self.pre.config):
            figures["pre_weight"] = float(self.pre.weight)
        written = state.log_history[-1]  # before the callbacks run
        if written == {**logs, "step": state.global_step}:
            written.update(figures)
        logs.update(figures)

    def on_save(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the heads beside an adapter."""
        if not self.is_alone or _is_partitioned(args) or not args.should_save:
            return
        assert self.pre is not None
        folder = _folder_of(args, state)
        if not folder.is_dir():
            logger.warning(f"PReCallback: expected a checkpoint at {folder}, got none")
        elif self._are_apart(args, model):
            self.pre.save(folder / PRE_DIR)

    def on_push_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Bring the heads of the checkpoint, which Trainer leaves there, to what it pushes."""
        if self.is_alone:
            bring_heads(_folder_of(args, state), Path(args.output_dir))

    def _are_apart(self, args: Any, model: Any) -> bool:
        """Whether no `save_pretrained` writes the heads, as a full model's does."""
        if _is_partitioned(args):
            return False
        assert self.pre is not None
        return state_of(self.pre).model is not model or args.save_on_each_node


def _is_partitioned(args: Any) -> bool:
    """Whether FSDP or DeepSpeed has the heads: by Trainer's arguments, or accelerate's launcher."""
    flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    is_launched = any(os.environ.get(flag, "false").lower() == "true" for flag in flags)
    return is_launched or bool(args.fsdp or args.deepspeed)


def _folder_of(args: Any, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _checkpoint_of(args: Any, state: TrainerState) -> Path:
    """The checkpoint that this state was read from, which Trainer does not name.

    Raises:
        ValueError: it is in none of the places where it can be.
    """

    def places() -> Iterator[Path]:
        if isinstance(args.resume_from_checkpoint, str):
            yield Path(args.resume_from_checkpoint)
        yield _folder_of(args, state)

    for folder in places():
        if (folder / STATE).is_file():
            saved = TrainerState.load_from_json(str(folder / STATE))
            if _trace(saved) == _trace(state):
                return folder
    raise ValueError(
        f"resume_from_checkpoint: training goes on from step {state.global_step}, and PReCallback "
        "is not told from which checkpoint, to read the heads there; expected it at "
        f"{_folder_of(args, state)}, or named in TrainingArguments(resume_from_checkpoint=...), "
        f"got {args.resume_from_checkpoint!r}"
    )


def _trace(state: TrainerState) -> str:
    """What a run leaves in its state, as text, because in text NaN equals NaN."""
    return json.dumps([state.global_step, state.log_history])
