# SPDX-License-Identifier: Apache-2.0
"""llamafactory-cli with PRe in the trainer that it makes; `prereg --help` names it.

LLaMA-Factory (0.9.5) has no plugins. PRe's settings are under `pre:` in its YAML file, or
`pre.weight=0.3` on the command line; its own parser does not get to see them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

from llamafactory import cli, launcher
from llamafactory.hparams import read_args
from llamafactory.train import tuner

from prereg_kernels._util.settings_file import take_flags
from prereg_kernels.cli.launch import RANK
from prereg_kernels.trainers.attaching import with_pre
from prereg_kernels.trainers.attachment import AttachSettings, read_settings

TRAINERS = {
    "sft": ("llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "dpo": ("llamafactory.train.dpo.trainer", "CustomDPOTrainer"),
}
"""Where a stage takes its trainer from. "pt" reads no images."""
OTHERS = ("USE_V1", "USE_MCA", "USE_RAY", "use_hyper_parallel")
"""What has trainers, or processes, of its own; in capitals: variables of the environment."""
_run = tuner.run_exp


def prepare(arguments: Sequence[str]) -> Callable[[], None]:
    """What runs llamafactory-cli; its `train` has PRe, any other command is as it is there.

    Raises:
        ValueError: a setting, or a way of training that goes without PRe.
    """
    sys.argv = ["llamafactory-cli", *arguments]
    if arguments[:1] == ["train"]:
        _read(arguments[1:])  # so that what is wrong is said once, before there are ranks
        # What it runs, in this process; and as each rank's program, where it starts torchrun
        tuner.run_exp = train
        # It splits its line at spaces: behind a path with one, a rank is found by its module's name
        program = f"-m prereg_kernels.cli.{RANK.stem}" if " " in str(RANK) else str(RANK)
        launcher.__file__ = f"{program} llamafactory"
    return cli.main


def train() -> None:
    """What llamafactory-cli runs on each rank, with PRe."""
    arguments, stage, settings = _read(sys.argv[1:])
    module, name = TRAINERS[stage]
    place = import_module(module)
    setattr(place, name, with_pre(getattr(place, name), **settings))
    _run(arguments)


def run(arguments: Sequence[str]) -> None:
    """What a rank runs that torchrun has started."""
    sys.argv = ["llamafactory-cli", *arguments]
    train()


def _read(arguments: Sequence[str]) -> tuple[Any, str, AttachSettings]:
    """(LLaMA-Factory's own arguments, the stage, PRe's settings)."""
    program, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        own: Any = read_args()
    finally:
        sys.argv = program
    if isinstance(own, Mapping):
        own = dict(own)
        written = own.pop("pre", None)
        named: Mapping[str, Any] = own
    else:
        own, written = take_flags(own, "pre.")
        named = {flag.removeprefix("--"): value for flag, value in pairwise(own)}
    stage = named.get("stage", "sft")
    if stage not in TRAINERS:
        raise ValueError(f"stage: expected one of {', '.join(TRAINERS)} with PRe, got {stage!r}")
    for name in OTHERS:
        value = os.environ.get(name) if name.isupper() else named.get(name)
        if str(value).lower() in ("true", "y", "1"):
            raise ValueError(f"{name}: expected it off, as PRe is not in what it runs; got {value}")
    return own, stage, read_settings(written)
