# SPDX-License-Identifier: Apache-2.0
"""PReTrainer: transformers' Trainer, with PRe's mean over the whole step, its figures, its heads.

A plain `transformers.Trainer` trains a model with PRe attached, too. There are three differences:

- L_PRe. The plain Trainer knows the step's label tokens, but not its visual tokens. It weights each
  micro-batch's mean of L_PRe by the micro-batch's share of the labels. So the term always has the
  right magnitude. It is exact if that share is also the share of the visual tokens. Over ranks it
  is the same. (Qwen2.5-VL and others with `accepts_loss_kwargs = False` get the mean over the
  micro-batches, as their L_LM does.) PReTrainer counts the visual tokens of the step, over
  micro-batches and ranks.
- Checkpoints. They hold a plain model, and the heads in `pre/`. A plain Trainer that resumes does
  not read `pre/`: attach PRe by `apply_pre(model, from_pretrained=checkpoint)` then. For most
  multimodal models Trainer (5.17) restores no weight at all, and says so in a warning about missing
  keys. PReTrainer restores both.
- Losses that Trainer computes itself from the logits, with `label_smoothing_factor` or
  `compute_loss_func`, do not hold the term, and PRe raises an error. TRL's SFTTrainer always
  computes its own loss. PReTrainer adds the term to whatever loss Trainer computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from prereg_kernels.attach.handle import find_pre, state_of
from prereg_kernels.attach.passes import Record
from prereg_kernels.trainers.callback import PReCallback
from prereg_kernels.trainers.checkpoints import Checkpoints
from prereg_kernels.trainers.frozen import warn_of_frozen_projector
from prereg_kernels.trainers.optimizers import HeadNorm, Optimizers, check_optimizer
from prereg_kernels.trainers.parallelism import Parallelism
from prereg_kernels.trainers.weights import LossWeight

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.get_logger(__name__)


def _as(original: Callable[P, R]) -> Callable[[Callable[..., Any]], Callable[P, R]]:
    """For type checkers: a method that passes its arguments on has the type of Trainer's."""
    return lambda method: method


class PReTrainerMixin(Checkpoints, Optimizers, Parallelism):
    """The mixin behind PReTrainer. Put it first: `class My(PReTrainerMixin, SFTTrainer)`.

    - Gradient. A step's gradient is that of `L_LM + weight * L_PRe`. L_PRe is the mean over all
      visual tokens of the step (with level="global", its images), over its micro-batches and all
      ranks. So 1 x 8 and 4 x 2 are equal.
    - Losses. This holds for whatever loss the trainer below computes. That loss need not come from
      the model, and may be of several forward passes: L_PRe of its micro-batch is then the mean
      over what all of them saw.
    - Other batches. If `count_rows` cannot count a micro-batch before its passes, as with GRPO's
      prompts, its L_PRe is the mean over what they saw on all ranks. L_PRe of the step is then the
      mean over its micro-batches.
    - Logs. "lm_loss" is what the loss would be without PRe. "pre_loss" is the mean of
      L_PRe over the steps since the last log, over all ranks and layers. Several layers have
      "pre_loss/layer_16" each, too. By default "loss" is "lm_loss"; with `value_in_forward` it
      holds the weighted term.
      "pre_grad_norm" is the heads' part of "grad_norm", before clipping. "pre_weight" is there if
      it changes: by `weight_schedule`, `weight_warmup_steps` or `gradient_ratio`.
    - Watched steps. With `watch_steps` the logs have the gradients at the layers' states, as
      `PRe.metrics` names them, for the step's whole objective and over all ranks. "pre_seconds" is
      the time of PRe's part of that step's backward passes.
    - Evaluation. With `value_in_eval` the metrics of `evaluate` and `predict` have "eval_pre_loss"
      and so on, over all visual tokens (or images) evaluated.
    - Optimizer. The one that the trainer makes gives the heads `head_learning_rate` and
      `head_weight_decay`, if the settings have them. One that you pass has to do so itself.
    - Checkpoints and `save_model` write a plain model, and the heads to `pre/` inside of it.
      `resume_from_checkpoint` and `load_best_model_at_end` read them. (Under FSDP with sharded
      checkpoints, and under DeepSpeed, the heads are part of what these save and load.)
    - Shared sequences. If ranks share each sequence, by accelerate's context or sequence
      parallelism or as `pre.sequence_parallel` says, each computes L_PRe of its own tokens, and all
      of the above holds.

    Not supported: `nn.DataParallel`, and level="global" with accelerate's context and sequence
    parallelism, which do not say where images are cut.

    Raises (when made):
        ValueError: the model has no PRe, or one of the above is asked for.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> class MyTrainer(PReTrainerMixin, Trainer):
        ...     pass
        >>> pre = apply_pre(model)
        >>> trainer = MyTrainer(model, TrainingArguments("out", use_cpu=True, report_to="none"))
        >>> trainer.pre is pre
        True
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._find_model()
        if self.args.n_gpu > 1:
            raise ValueError(
                f"PRe: expected a process per GPU, got {self.args.n_gpu} GPUs in this one, which "
                "Trainer would use through nn.DataParallel; start it by torchrun or accelerate "
                "launch, or set CUDA_VISIBLE_DEVICES"
            )
        self._check_parallelism()
        # Of the step: how many micro-batches, and the rows of those to come; None: not known.
        self._micro_batches = 1
        self._counts: list[Tensor] | None = []
        # Of the micro-batch: its rows as counted, its loss without the term, its passes' records.
        self._counted: Tensor | None = None
        self._lm_loss: Tensor | None = None
        self._records: Sequence[Record] = ()
        # Sums on this rank since the last log, as `_figures_of` has them; and of an evaluation.
        self._window: Tensor | None = None
        self._evaluated: Tensor | None = None
        self._is_optimizer_checked = False
        self._head_norm = HeadNorm(self)
        self._loss_weight = LossWeight(self)
        self.add_callback(self._head_norm)
        self.add_callback(self._loss_weight)

    def _find_model(self) -> None:
        """Check that the model has PRe, once the trainer below has made, loaded or wrapped it."""
        warn_of_frozen_projector(find_pre(self.model))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PReCallback):
                callback.is_alone = False

    @_as(Trainer.train)
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's method.

        Raises:
            ValueError: a head is frozen, or not in the optimizer.
        """
        self.pre.check()
        self._window, self._is_optimizer_checked = None, False
        try:
            return super().train(*args, **kwargs)
        finally:
            self.pre.denominator = None  # of a step of this run; of no use to what comes after
            self._loss_weight.end()
            self._counts = []

    # The step: its denominator, its loss, its figures.

    def count_rows(self, batch: Any) -> Tensor | None:
        """The rows of a micro-batch before `training_step` gets it: 0-dim, int64, as `pre.count`.

        None if the micro-batch does not say: it is no mapping with "input_ids", and the family has
        no mask function. Override this for a batch of another form.
        """
        if not isinstance(batch, Mapping):
            return None
        is_known = batch.get("input_ids") is not None or self.pre.family.visual_mask is not None
        return self.pre.count(batch) if is_known else None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Trainer's method: the micro-batches of a step, and their label tokens."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._is_optimizer_checked:  # in the first step of a run
            check_optimizer(self.optimizer, self.model)
            self._share_sequences()
            self._is_optimizer_checked = True
        counts = [self.count_rows(batch) for batch in batches]
        known = [count.to(device) for count in counts if count is not None]
        self._micro_batches = max(len(batches), 1)
        # What the term will be multiplied by on its way to the gradient, each for L_LM's sake: by
        # compute_loss, by DDP, FSDP or ZeRO, which average over ranks, and by training_step.
        factor = self._loss_scale(items) / self._replicas()
        if self._is_divided(items):
            factor /= self._micro_batches
        if len(known) < len(counts):  # compute_loss divides by what the passes see
            self._counts, self.pre.denominator = None, factor * self._micro_batches
            if len(batches) > 1:
                self._say_what_the_mean_is(batches[counts.index(None)])
        else:
            rows = sum(known, torch.zeros((), dtype=torch.int64, device=device))
            rows = self.accelerator.reduce(rows, reduction="sum") / self._copies()
            self._counts, self.pre.denominator = known, rows.clamp(min=1) * factor
        return batches, items

    def _say_what_the_mean_is(self, batch: Any) -> None:
        logger.warning_once(
            f"PRe: the visual tokens of a batch of type {type(batch).__name__} cannot be counted "
            "before its forward passes, so L_PRe of a step is the mean over its micro-batches' "
            "means. To make it the mean over all visual tokens of the step, override count_rows"
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Trainer's method; in training, it adds the term.

        Raises:
            RuntimeError: no training forward pass went through the model with PRe.
        """
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        computing = state_of(self.pre).computing_on(inputs)
        if not (model.training and torch.is_grad_enabled()):
            with computing:
                return super().compute_loss(model, inputs, **options)
        with computing, self.pre.collecting() as passes:
            result = super().compute_loss(model, inputs, **options)
        trained = [(each.term, each.record) for each in passes if each.term is not None]
        if not trained:
            raise RuntimeError(
                "PRe: computing the loss made no training forward pass through the model that PRe "
                "is attached to"
            )
        loss, outputs = result if return_outputs else (result, None)
        terms, self._records = zip(*trained, strict=True)
        self._lm_loss = loss.detach()
        term = self._weigh(torch.stack(terms), self._records).to(loss.device)
        loss = loss + self._of_all_parts(term) * self._loss_scale(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _weigh(self, terms: Tensor, records: Sequence[Record]) -> Tensor:
        """One term for the passes of a micro-batch: the mean of their rows, weighted in the step.

        Each pass's own term is the sum of its rows over the denominator, or, without one, the mean.
        """
        rows = torch.stack([record.rows for record in records]).to(terms.device)
        seen = rows.sum()
        if self.pre.denominator is None:  # not in a step of `train`
            return (terms * rows).sum() / seen.clamp(min=1)
        if self._counts is None:
            seen = self.accelerator.reduce(seen, reduction="sum") / state_of(self.pre).copies
            return terms.sum() / seen.clamp(min=1)
        if self._counted is None:
            return terms.sum()
        if (shared := self._counts_parts_of()) is not None:
            seen = shared.total(seen)
        # As often as the passes saw the batch's rows, which was counted once.
        return terms.sum() * (self._counted.to(seen) / seen.clamp(min=1))

    @_as(Trainer.training_step)
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's method: the forward and backward passes of a micro-batch."""
        self._counted = self._counts.pop(0) if self._counts else None
        self._records, self._lm_loss = (), None
        loss = super().training_step(*args, **kwargs)
        lm_loss, records = self._lm_loss, self._records
        if lm_loss is None:
            raise RuntimeError(
                f"PRe: compute_loss of {type(self).__name__} did not come to PReTrainer's, which "
                "adds the term; expected it to call super().compute_loss, or a class made by "
                "prereg_kernels.trainers.with_pre of the one that computes the loss"
            )
        if not all(record.is_complete() for record in records):
            raise RuntimeError("PRe: the backward pass has not reached the term")
        self._loss_weight.add(records)
        totals = torch.stack([_totals(record) for record in records]).sum(dim=0)
        items = kwargs.get("num_items_in_batch", args[2] if len(args) > 2 else None)
        share = 1 / self._micro_batches
        lm_loss = (lm_loss * share if self._is_divided(items) else lm_loss).to(totals)
        # As for Trainer's "loss", a step without labels, of which L_LM is 0 / 0, is none for it.
        hides = getattr(self, "leaves_out_non_finite", self.args.logging_nan_inf_filter)
        is_one = lm_loss.isfinite() if hides else torch.ones_like(lm_loss)
        counted = totals[0] if self._counted is None else self._counted.to(totals)
        figures = torch.stack([lm_loss.where(is_one.bool(), 0.0), is_one * share, counted])
        figures = torch.cat([figures, totals])
        self._window = figures if self._window is None else self._window + figures
        return loss

    @_as(Trainer.log)
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's method; it puts PRe's figures beside Trainer's regular ones.

        Raises:
            ValueError: `count_rows` found none of the rows that the passes saw.
        """
        # By these two, as others log as well, and not always on all ranks.
        is_regular = "loss" in logs and "learning_rate" in logs
        if is_regular and self._window is None:
            logger.warning_once(
                f"PRe: training_step of {type(self).__name__} did not come to PReTrainer's, so the "
                "logs lack its figures; expected it to call super().training_step"
            )
        elif is_regular and self._window is not None:
            share = self._head_norm.take(logs) / self.accelerator.num_processes  # all have it
            window = torch.cat([self._window, share.to(self._window)])
            window = self.accelerator.reduce(window, reduction="sum")
            lm_loss, steps, counted, *totals, norm = window.tolist()
            if totals[0] and not counted:
                raise ValueError(
                    f"count_rows: expected the rows of L_PRe in the batches, of which the forward "
                    f"passes saw {totals[0]:.0f}, got 0; override it, or let it return None"
                )
            logs["lm_loss"] = lm_loss / steps if steps else math.nan
            logs |= self._loss_weight.take()
            if totals[0] or self.pre.weight != 0:
                logs |= self._figures_of(totals)
            if not math.isnan(norm):
                logs["pre_grad_norm"] = norm
            self._window = None
        super().log(logs, *args, **kwargs)

    def _figures_of(self, totals: Sequence[float], prefix: str = "") -> dict[str, float]:
        """The means of the rows, of which `totals` has their number and a sum for each layer."""
        rows, *sums = totals
        per_layer = [total / max(rows, 1.0) for total in sums]
        figures = {f"{prefix}pre_loss": sum(per_layer) / len(per_layer)}
        if len(per_layer) > 1:
            named = zip(self.pre.heads, per_layer, strict=True)
            figures |= {f"{prefix}pre_loss/layer_{layer}": value for layer, value in named}
        return figures

    # Evaluation.

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Trainer's method; with `value_in_eval` the metrics have PRe's figures.

        Samples that a rank gets twice, to fill its last batch, count twice.
        """
        self._evaluated = None
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self.pre.config.value_in_eval:
            totals = self._evaluated
            if totals is None:  # nothing to evaluate on this rank
                totals = torch.zeros(1 + len(self.pre.heads), device=self.args.device)
            totals = self.accelerator.reduce(totals, reduction="sum")
            output.metrics.update(self._figures_of(totals.tolist(), f"{metric_key_prefix}_"))
        return output

    @_as(Trainer.prediction_step)
    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's method."""
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        with state_of(self.pre).computing_on(inputs), self.pre.collecting() as passes:
            result = super().prediction_step(*args, **kwargs)
        for each in passes:
            totals = _totals(each.record)
            self._evaluated = totals if self._evaluated is None else self._evaluated + totals
        return result

    # How Trainer weights losses.

    def _is_divided(self, items: Any) -> bool:
        """Whether Trainer divides the loss by the number of micro-batches."""
        if hasattr(Trainer, "loss_is_scaled_for_ga"):  # in the newest, where subclasses say so
            is_scaled: bool | None = self.loss_is_scaled_for_ga
            if is_scaled is not None:
                return not is_scaled
        by_items = self.model_accepts_loss_kwargs and items is not None
        return not by_items and self.compute_loss_func is None


class PReTrainer(PReTrainerMixin, Trainer):
    """transformers' Trainer for a model with PRe attached; see PReTrainerMixin.

    Example:
        >>> from transformers import TrainingArguments
        >>> pre = apply_pre(model)
        >>> arguments = TrainingArguments("out", max_steps=1, use_cpu=True, report_to="none")
        >>> trainer = PReTrainer(model, arguments, train_dataset=[batch] * 8)
        >>> trainer.count_rows(batch)  # its visual tokens, which the step's L_PRe is the mean over
        tensor(8)
    """

    @_as(Trainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def _totals(record: Record) -> Tensor:
    """The rows of a pass, and for each layer the sum of their losses: (1 + layers,)."""
    return torch.stack([record.rows, *record.sums()])
