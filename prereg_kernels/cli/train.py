# SPDX-License-Identifier: Apache-2.0
"""The commands `prereg train`, `assemble` and `evaluate`: from arguments to what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from prereg_kernels._util.files import printable
from prereg_kernels.train.assemble import assemble
from prereg_kernels.train.benchmarks import evaluate_tasks
from prereg_kernels.train.config import DataConfig, load_config
from prereg_kernels.train.cost import describe_cost
from prereg_kernels.train.dry_run import describe_run
from prereg_kernels.train.evaluate import evaluate
from prereg_kernels.train.run import Stopped, train

STOPPED = (Stopped,)
"""What a command raises when it was asked to stop, and has saved."""


def run(arguments: argparse.Namespace, flags: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ValueError: arguments, settings, models or data that are not as expected.
        OSError: a file cannot be read or written.
        Stopped: by a signal.
    """
    if arguments.command == "assemble":
        assemble(arguments.vision, arguments.llm, arguments.out, seed=arguments.seed)
        print(f"model: {printable(arguments.out)}")
        return
    if arguments.command == "evaluate":
        _evaluate(arguments)
        return
    if arguments.out is not None:
        flags = [*flags, f"--out={arguments.out}"]
    config = load_config(arguments.config, flags)
    if arguments.dry_run:
        print(describe_run(config))
        print(describe_cost(config))
        return
    out = train(config, fresh=arguments.fresh)
    print(f"model: {printable(out)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    out = arguments.out or arguments.model
    settings = {
        "batch_size": arguments.batch,
        "device": arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "dtype": None if arguments.dtype is None else getattr(torch, arguments.dtype),
    }
    if arguments.tasks is not None:
        if arguments.images is not None:
            raise ValueError("--images: expected --data beside it, got --tasks")
        results = evaluate_tasks(
            arguments.model,
            arguments.tasks.split(","),
            out,
            task_files=arguments.task_files,
            limit=arguments.limit,
            **settings,
        )
        for task, figures in results.items():
            print(f"{task}: " + ", ".join(f"{name} {x:.4g}" for name, x in figures.items()))
        return
    for name in ("task_files", "limit"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: expected --tasks beside it, got --data")
    data = DataConfig(str(arguments.data), arguments.format, arguments.images)
    found = evaluate(arguments.model, data, out, **settings)
    print(
        f"{found.questions} questions: {found.exact_match:.1%} right "
        f"(always the commonest answer: {found.commonest:.1%})"
    )
    if found.choice_accuracy is not None:
        print(f"{found.choices} of them multiple choice: {found.choice_accuracy:.1%} right")
    if found.bad:
        print(f"{found.bad} samples could not be used")
