# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases, where `report_to` asks for it: a run a stage, its files in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Collection
from importlib import import_module
from pathlib import Path

from transformers.integrations import is_wandb_available


def check_wandb(report_to: Collection[str], out: Path) -> None:
    """Raise ValueError where it is asked for and not installed."""
    if "wandb" not in report_to:
        return
    if not is_wandb_available():
        raise ValueError(
            "trainer.report_to: wandb is not installed here; pip install wandb, or leave it out"
        )
    os.environ.setdefault("WANDB_DIR", str(out))  # else the current folder


def finish_wandb(report_to: Collection[str]) -> None:
    """End the run of a stage: the next one's would go on in it, and count its steps from 1."""
    if "wandb" in report_to:
        wandb = import_module("wandb")
        if wandb.run is not None:
            wandb.finish()
