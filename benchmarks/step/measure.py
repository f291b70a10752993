# SPDX-License-Identifier: Apache-2.0
"""Measures one setting of the training-step benchmark: its batch, memory and interleaved times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.common.program import Session
from benchmarks.common.report import Json, is_timed, summarize_variant
from benchmarks.common.timing import (
    Effort,
    Measured,
    Step,
    describe_error,
    time_one,
    warm_and_interleave,
)
from benchmarks.step.flops import count_flops
from benchmarks.step.models import Batch, Recipe, make_batch, set_checkpointing
from benchmarks.step.variants import (
    OURS,
    VARIANTS,
    WITHOUT,
    Attach,
    Attached,
    Regularizer,
    attached,
)

LEARNING_RATE = 1e-6  # the weights are random: a step must cost what it costs, not learn
TOWER_EFFORT = Effort(3, 3, 0.0)
FULLEST = 0.92  # of the device's memory: above it, the allocator frees and asks again within a step


@dataclass
class Trainer:
    """The model, and a step of each variant on a batch. SGD without momentum: it has no state."""

    session: Session
    recipe: Recipe
    model: Any
    regularizer: Regularizer

    def stepper(self, variant: Attached, batch: Batch) -> Step:
        """The variant's step: forward, backward, update; the gradients are freed."""
        trained = dict.fromkeys(p for p in self.model.parameters() if p.requires_grad)
        if variant.head is not None:  # a part of the model or not
            trained |= dict.fromkeys(variant.head.parameters())
        optimizer = torch.optim.SGD(list(trained), lr=LEARNING_RATE)

        def step() -> None:
            variant.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def tower_ms(self, batch: Batch) -> float:
        """The median time of the image features alone, without gradients.

        Qwen's tower calls attention once a window where there is no flash-attn: thousands of small
        launches, which a step waits for, and which make any share of it look smaller.
        """
        names = ("pixel_values", "image_grid_thw")
        pixels = {name: batch[name] for name in names if name in batch}

        def features() -> None:
            with torch.no_grad():
                self.model.get_image_features(**pixels)

        return statistics.median(time_one(features, self.session.clock, TOWER_EFFORT))

    def forget(self) -> None:
        """What a step that failed has left behind."""
        self.model.zero_grad(set_to_none=True)
        self.session.free()

    def peak_memory(self, attach: Attach, batch: Batch) -> int | None:
        """Bytes at the peak of a step, weights included, the benchmark's own buffer not.

        None where there is no GPU: a process's resident size says nothing about one step.
        """
        with attached(self.model, attach, self.regularizer) as variant:
            step = self.stepper(variant, batch)
            step()  # workspaces, libraries
            if self.session.device.type != "cuda":
                return None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self._own_bytes()

    def _own_bytes(self) -> int:
        buffer = getattr(self.session.clock, "buffer", None)
        return 0 if buffer is None else int(buffer.nbytes)


def run_setting(trainer: Trainer, checkpointing: bool, effort: Effort, record: Json) -> None:
    """Fill `record`: the batch that fits, every variant's peak memory and times."""
    session, recipe, model = trainer.session, trainer.recipe, trainer.model
    set_checkpointing(model, checkpointing)
    record |= {"name": setting_name(checkpointing), "checkpointing": checkpointing}
    record |= {"backed_off": [], "variants": {name: {"status": "not timed"} for name in VARIANTS}}
    batch, peaks = _fit(trainer, record)
    samples = len(batch["input_ids"])
    record |= {
        "batch": samples,
        "positions": recipe.positions(model.config),
        "visual_tokens": samples * recipe.visual_tokens(model.config),
        "flops": count_flops(recipe, model.config, samples, checkpointing).describe(),
        "tower_ms": trainer.tower_ms(batch),
    }
    for name, attach in VARIANTS.items():
        if name not in peaks:
            try:
                peaks[name] = trainer.peak_memory(attach, batch)
            except Exception as error:
                record["variants"][name] = {"status": "failed", "reason": describe_error(error)}
                session.failed(f"{record['name']}, {name}", describe_error(error), ours=False)
                trainer.forget()
    turns = Turns(trainer, batch)
    steps = {name: turns.measured(VARIANTS[name]) for name in peaks}
    times, errors = warm_and_interleave(steps, session.clock, effort)
    turns.end()
    for name, samples_ms in times.items():
        record["variants"][name] = summarize_variant(samples_ms) | {"peak_bytes": peaks[name]}
    for name, error in errors.items():
        record["variants"][name] = {"status": "failed", "reason": error}
        session.failed(f"{record['name']}, {name}", error, name == OURS)
    add_differences(record["variants"], head_bytes(trainer.regularizer, model), record["tower_ms"])


def setting_name(checkpointing: bool) -> str:
    return f"checkpointing {'on' if checkpointing else 'off'}"


def _fit(trainer: Trainer, record: Json) -> tuple[Batch, dict[str, int | None]]:
    """The largest batch, halved from the recipe's, with which the step without PRe and ours fit.

    They fit if they do not run out of memory, and the allocator has reserved at most `FULLEST` of
    the device's. A peer that does not fit into that batch is reported as such.
    """
    session, samples = trainer.session, trainer.recipe.batch
    while True:
        batch = make_batch(
            trainer.recipe, trainer.model.config, samples, session.device, trainer.model.dtype
        )
        try:
            peaks = {n: trainer.peak_memory(VARIANTS[n], batch) for n in (WITHOUT, OURS)}
            reason = _too_full(session.device)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        if reason is None:
            return batch, peaks
        if samples == 1:
            raise RuntimeError(f"one sample does not fit: {reason}")
        record["backed_off"].append({"batch": samples, "reason": reason})
        samples //= 2
        del batch
        trainer.forget()


def _too_full(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    share = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(device).total_memory
    return None if share <= FULLEST else f"{share:.0%} of the memory reserved"


class Turns:
    """Steps that may follow each other in any order: each variant is attached before its sample,
    outside of the time, and detached before the next one's.
    """

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self.trainer, self.batch = trainer, batch
        self.current: tuple[Attached, Step] | None = None

    def measured(self, attach: Attach) -> Measured:
        """The step of a variant, as `interleave` takes it."""
        return Measured(self.step, partial(self.switch, attach))

    def switch(self, attach: Attach) -> None:
        self.end()
        variant = attach(self.trainer.model, self.trainer.regularizer)
        self.current = variant, self.trainer.stepper(variant, self.batch)

    def step(self) -> None:
        assert self.current is not None
        self.current[1]()

    def end(self) -> None:
        """Detach the last variant, and drop what a step that failed left behind."""
        if self.current is not None:
            self.current[0].detach()
            self.current = None
            self.trainer.model.zero_grad(set_to_none=True)


def head_bytes(regularizer: Regularizer, model: Any) -> dict[str, int]:
    """What a head costs whoever trains it: parameters, gradients, and the state of plain SGD."""
    parameters = sum(x.numel() for x in regularizer.state.values()) * model.dtype.itemsize
    return {"parameters": parameters, "gradients": parameters, "optimizer": 0}


def add_differences(variants: Json, head: Mapping[str, int], tower_ms: float) -> None:
    """To each variant with PRe, in place: what it adds to the step without.

    added_ms and added_percent, of the medians; added_percent_paired and its quartiles, of the
    rounds' own ratios, each of which compares two neighbours in time; added_percent_llm, of a step
    whose frozen tower costs nothing; added_bytes, of the peaks, and beyond_bytes and
    beyond_percent, less the head's own bytes.
    """
    base = variants.get(WITHOUT)
    if not is_timed(base):
        return
    for name, variant in variants.items():
        if name == WITHOUT or not is_timed(variant):
            continue
        added = variant["median_ms"] - base["median_ms"]
        variant |= {"added_ms": added, "added_percent": 100 * added / base["median_ms"]}
        pairs = zip(variant["samples_ms"], base["samples_ms"], strict=True)
        ratios = sorted(100 * (ours / theirs - 1) for ours, theirs in pairs)
        quartiles = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
        variant |= {
            "added_percent_paired": statistics.median(ratios),
            "added_percent_quartiles": quartiles,
            "added_percent_llm": 100 * added / (base["median_ms"] - tower_ms),
        }
        if variant["peak_bytes"] is not None:
            bytes_ = variant["peak_bytes"] - base["peak_bytes"]
            beyond = bytes_ - sum(head.values())
            variant |= {"added_bytes": bytes_, "beyond_bytes": beyond}
            variant["beyond_percent"] = 100 * beyond / base["peak_bytes"]
