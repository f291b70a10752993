# SPDX-License-Identifier: Apache-2.0
"""Runs under an engine, and one process that they have to equal."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from prereg_kernels.train.config import load_config
from prereg_kernels.train.run import train
from tests.train.launching import RANK, accelerate, faulty, start, torchrun
from tests.train.places import make_place, metrics, settings, write
from tests.trainers.test_accelerate_configs import for_cpus

# SGD: the weights of a step are then its gradients
STEPS: dict[str, Any] = {
    "trainer__optim": "sgd", "trainer__max_grad_norm": 0.0, "trainer__save_steps": 2,
    "stages__0__max_steps": 1, "stages__0__gradient_accumulation_steps": 2,
    "stages__1__max_steps": 3, "stages__1__learning_rate": 0.1,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": {"r": 4}}}
AS_THE_TRAINER = ("gradient_accumulation_steps", "gradient_clipping")


class Place:
    """A model and data; one process's runs on them, each started once."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_place(folder)
        self._alone: dict[str, Path] = {}

    def alone(self, tuned: str) -> Path:
        """One process, with micro-batches of four rows."""
        if tuned not in self._alone:
            out = self.folder / f"alone-{tuned}"
            path = write(
                out.with_suffix(".yaml"), settings(self.folder, out, **STEPS, **SETTINGS[tuned])
            )
            with (
                warnings.catch_warnings()
            ):  # of text alone there are fewer than the first stage takes
                warnings.simplefilter("ignore", UserWarning)
                self._alone[tuned] = train(load_config(path))
        return self._alone[tuned]

    def run(
        self,
        tuned: str,
        out: Path,
        *,
        launcher: str | None = None,
        ranks: int = 2,
        faults: Sequence[str] = (),
        restarts: int = 0,
        is_expected_to_fail: bool = False,
        variables: Mapping[str, str] = MappingProxyType({}),
        **changes: Any,
    ) -> str:
        """Ranks with micro-batches of two rows; returns what they said.

        Args:
            launcher: a file of examples/accelerate, by whose settings accelerate starts them; None:
                torchrun.
        """
        changes = {
            "trainer__per_device_train_batch_size": 4 // ranks,
            "trainer__use_cpu": False,
        } | changes
        own = {**STEPS, **SETTINGS[tuned], **changes}
        path = write(out.with_suffix(".yaml"), settings(self.folder, out, **own))
        if launcher is None:
            command = torchrun(ranks, f"--max-restarts={restarts}", module=RANK)
        else:
            config, told = for_cpus(launcher)
            variables = {**variables, **told}
            if "deepspeed_config" in config:  # as the file says of a Trainer
                config["deepspeed_config"] |= dict.fromkeys(AS_THE_TRAINER, "auto")
            file = write(out.with_name("accelerate.yaml"), config | {"num_processes": ranks})
            command = accelerate(file, f"--max_restarts={restarts}", module=RANK)
        done = start(
            *command, "train", str(path), cwd=out.parent, timeout=400,
            **faulty(out.parent, faults or ["0 none none"]), **variables,
        )  # fmt: skip
        assert (done.returncode != 0) == is_expected_to_fail, done.stderr[-6000:]
        return done.stderr

    def check(self, tuned: str, out: Path) -> None:
        """What one process has: losses, gradients' norms, the model of each stage, the heads."""
        alone = self.alone(tuned)
        for stage in ("align", "tune"):
            ours, expected = metrics(out, stage), metrics(alone, stage)
            assert [line["step"] for line in ours] == [line["step"] for line in expected]
            for a, b in zip(ours, expected, strict=True):
                for name in b.keys() & {"lm_loss", "pre_loss", "grad_norm"}:
                    assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
        for part in ("stages/align/model", "."):
            close(whole(out / part), whole(alone / part))
        head = "pre/pre_heads.safetensors"
        close(load_file(out / head), load_file(alone / head))
        assert not list(out.glob("adapter_*")) and not list(out.rglob(".writing/*"))


def whole(folder: Path) -> dict[str, Tensor]:
    """A model as plain transformers loads it, without a word."""
    model, notes = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.state_dict()


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Up to rounding: weights of about 0.1, in float32."""
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert (x - theirs[name]).abs().max() < 1e-6, name
