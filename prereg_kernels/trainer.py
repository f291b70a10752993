"""PreTrainer: transformers' Trainer, with PRe's mean over the whole step, its figures, its heads.

A plain `transformers.Trainer` trains a model with PRe attached, too, with three differences:

- L_PRe. The plain Trainer knows the step's label tokens, not its visual tokens. Each micro-batch's
  mean of L_PRe is weighted by its share of the labels, so the term has the right magnitude always,
  and is exact where that share is also its share of the visual tokens. (Qwen2.5-VL and others with
  `accepts_loss_kwargs = False` get the mean over the micro-batches, as their L_LM does.) Over ranks
  it is the same. PreTrainer counts the visual tokens of the step, over micro-batches and ranks.
- Checkpoints. They hold a plain model, and the heads in `pre/`, which a plain Trainer that resumes
  does not read: attach PRe by `apply_pre(model, from_pretrained=checkpoint)` then. And of most
  multimodal models Trainer (5.17) restores no weight at all, and says so in a warning about missing
  keys; PreTrainer restores them.
- Losses that Trainer computes itself from the logits, with `label_smoothing_factor` or
  `compute_loss_func`, do not hold the term: the heads do not train, and a warning says so. TRL's
  SFTTrainer computes its own loss always.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from prereg_kernels.handle import HEADS, PRe, find_pre, heads_of
from prereg_kernels.storage import PRE_DIR

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.get_logger(__name__)


class PreTrainerMixin(_Base):
    """What makes a Trainer a PreTrainer; put it first: `class My(PreTrainerMixin, SFTTrainer)`.

    - The gradient of a step is that of `L_LM + weight * L_PRe`, with L_PRe the mean over all visual
      tokens (with level="global", images) of the step, over its micro-batches and all ranks; 1 x 8
      and 4 x 2 are equal.
    - This holds for whatever loss the trainer below computes; that loss need not come from the
      model.
    - The logs have "lm_loss", what the loss would be without PRe, and "pre_loss", over the steps
      since the last log, all ranks, and, for the latter, averaged over these; several
      layers have "pre_loss/layer_16" each, too. By default "loss" is "lm_loss"; with
      `value_in_forward` it holds the weighted term.
    - Checkpoints and `save_model` write a plain model, and the heads to `pre/` inside of it;
      `resume_from_checkpoint` and `load_best_model_at_end` read them. (Under FSDP with sharded
      checkpoints, and under DeepSpeed, the heads are part of what these save and load.)

    Not supported: `nn.DataParallel`, context and sequence parallelism.

    Raises (when made):
        ValueError: a model without PRe, or one of the above.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        find_pre(self.model)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"PRe: expected a process per GPU, got {self.args.n_gpu} GPUs in this one, which "
                "Trainer would use through nn.DataParallel; start it by torchrun or accelerate "
                "launch, or set CUDA_VISIBLE_DEVICES"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "PRe: expected whole sequences on each rank, got context or sequence parallelism"
            )
        # (2 + layers,) of this rank since the last log: [sum of L_LM, rows, sums of their losses]
        self._window: Tensor | None = None
        self._window_steps = 0
        self._micro_batch_lm_loss: Tensor | None = None
        self._read_from: str | None = None  # the checkpoint that is being read

    @property
    def pre(self) -> PRe:
        """PRe's handle on the model."""
        return find_pre(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's.

        Raises:
            ValueError: a head is frozen.
        """
        self.pre.check_heads_train()
        self._window, self._window_steps = None, 0
        try:
            return super().train(*args, **kwargs)
        finally:
            self.pre.denominator = None  # of a step of this run; of no use to what comes after

    # The step: its denominator, its loss, its figures.

    def count_rows(self, batch: Mapping[str, Any]) -> Tensor:
        """0-dim, int64: as `pre.count`, of a micro-batch before it is given to `compute_loss`.

        Raises:
            ValueError: it has no "input_ids"; override this for a batch of another form.
        """
        if "input_ids" not in batch:
            raise ValueError(
                f"batch: PRe finds the visual tokens by its input_ids; got {', '.join(batch)}"
            )
        return self.pre.count(batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As Trainer's: the micro-batches of a step, and their label tokens."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            rows += self.count_rows(batch).to(device)
        rows = self.accelerator.reduce(rows, reduction="sum") / self._copies()
        # What the term will be multiplied by on its way to the gradient, each for L_LM's sake: by
        # compute_loss, by DDP, FSDP or ZeRO, which average over ranks, and by training_step.
        factor = self._loss_scale(items) / self._replicas()
        if self._is_divided(items):
            factor /= max(len(batches), 1)
        self.pre.denominator = rows * factor
        self._window_steps += 1
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As Trainer's; in training, plus the term.

        Raises:
            RuntimeError: no training forward pass went through the model with PRe.
        """
        pre, training = self.pre, model.training and torch.is_grad_enabled()
        with _term_apart(pre):
            result = super().compute_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        term, pre.loss = pre.loss, None
        if not training:
            return result
        if term is None:
            raise RuntimeError(
                "PRe: computing the loss made no training forward pass through the model that PRe "
                "is attached to"
            )
        loss, outputs = result if return_outputs else (result, None)
        self._micro_batch_lm_loss = loss.detach()
        loss = loss + term.to(loss.device) * self._loss_scale(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's: the forward and backward passes of a micro-batch."""
        loss = super().training_step(*args, **kwargs)
        totals, lm_loss = self.pre.totals(), self._micro_batch_lm_loss
        if totals is None or lm_loss is None:
            raise RuntimeError("PRe: the backward pass has not reached the term")
        items = kwargs.get("num_items_in_batch", args[2] if len(args) > 2 else None)
        if self._is_divided(items):
            lm_loss = lm_loss / self.current_gradient_accumulation_steps
        figures = torch.cat([lm_loss.reshape(1).to(totals), totals])
        self._window = figures if self._window is None else self._window + figures
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's; its regular figures get those of PRe beside them."""
        # By these two, as others log as well, and not always on all ranks.
        if self._window is not None and "loss" in logs and "learning_rate" in logs:
            window = self.accelerator.reduce(self._window, reduction="sum")
            lm_loss, rows, *sums = window.tolist()
            per_layer = [total / max(rows, 1.0) for total in sums]
            ranks = self.accelerator.num_processes
            logs["lm_loss"] = lm_loss / ranks / max(self._window_steps, 1)
            logs["pre_loss"] = sum(per_layer) / len(per_layer)
            if len(per_layer) > 1:
                named = zip(self.pre.heads, per_layer, strict=True)
                logs |= {f"pre_loss/layer_{layer}": value for layer, value in named}
            self._window, self._window_steps = None, 0
        super().log(logs, *args, **kwargs)

    def _copies(self) -> int:
        """How many ranks get each micro-batch."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return 1 if parallelism is None else parallelism.tp_size

    def _replicas(self) -> int:
        """How many different micro-batches there are at a time; gradients are averaged over."""
        return self.accelerator.num_processes // self._copies()

    def _loss_scale(self, items: Any) -> int:
        """What Trainer multiplies the loss by, so that averaging over ranks makes it a sum."""
        known = self.args.average_tokens_across_devices and items is not None
        return self._replicas() if known else 1

    def _is_divided(self, items: Any) -> bool:
        """Whether Trainer divides the loss by the number of micro-batches."""
        by_items = self.model_accepts_loss_kwargs and items is not None
        return not by_items and self.compute_loss_func is None

    # Checkpoints.

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
        written = inner is self.pre.model and not self.args.save_on_each_node
        if not written and heads != {}:
            self.pre.save(Path(output_dir or self.args.output_dir) / PRE_DIR, heads)

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
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        self._read_from = path
        try:
            yield
        finally:
            self._read_from = None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As if there were no heads, which have their own file."""
        model = self.pre.model
        if load_result.unexpected_keys and self._read_from is not None:
            load_result = _load_weights(model, self._read_from)
        ignored = model._keys_to_ignore_on_save
        missing = [name for name in load_result.missing_keys if f"{HEADS}." not in name]
        model._keys_to_ignore_on_save = {name for name in ignored if f"{HEADS}." not in name}
        try:
            super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))
        finally:
            model._keys_to_ignore_on_save = ignored


class PreTrainer(PreTrainerMixin, Trainer):
    """transformers' Trainer for a model with PRe attached; see PreTrainerMixin."""


@contextmanager
def _term_apart(pre: PRe) -> Iterator[None]:
    """The model's loss stays L_LM, and the term is in `pre.loss`."""
    before, pre.add_to_loss = pre.add_to_loss, False
    try:
        yield
    finally:
        pre.add_to_loss = before


def _load_weights(model: Any, path: str) -> Any:
    """Load a checkpoint's weights, as `from_pretrained` reads them.

    `save_pretrained` writes the names of the hub's checkpoints, which are not the modules' in most
    multimodal models; Trainer (5.17) looks for the modules', and leaves all else as it was.
    """
    own = (x for name, x in model.state_dict().items() if f"{HEADS}." not in name)
    dtypes = {x.dtype for x in own if x.is_floating_point()}
    widest = reduce(torch.promote_types, dtypes)  # so that nothing is rounded on the way
    with torch.random.fork_rng(devices=[]):
        read = type(model).from_pretrained(path, dtype=widest, local_files_only=True)
    return model.load_state_dict(read.state_dict(), strict=False)
