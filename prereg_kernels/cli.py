"""The command line: `prereg train`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer
from click import ClickException
from click.exceptions import Abort, Exit
from rich.console import Console

from prereg_kernels._version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command; errors are one line on standard error, and exit code 2 (130: stopped)."""
    from prereg_kernels.training.checkpoint import CheckpointError
    from prereg_kernels.training.loop import TrainingInterrupted
    from prereg_kernels.training.workers import Interrupted, UnitError

    try:
        code = app(standalone_mode=False) or 0
    except Exit as exit:
        code = exit.exit_code
    except (Interrupted, TrainingInterrupted, KeyboardInterrupt, Abort) as stop:
        code = _fail(str(stop) or "stopped", 130)
    except ClickException as error:
        code = _fail(error.format_message())
    except (ValueError, TypeError, OSError, CheckpointError, UnitError) as error:
        code = _fail(str(error))
    sys.exit(code)


def _fail(message: str, code: int = 2) -> int:
    print(f"prereg: {' '.join(message.split())}", file=sys.stderr)
    return code


@app.callback()
def _prereg() -> None:
    """Predictive Regularization for multimodal LLMs."""


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def train(
    preset: Annotated[
        str | None, typer.Option(help="A paired experiment: scenes, or a YAML file of your own.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file: one training run with these settings.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where everything goes; default runs/<name>.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Preset: number of paired seeds.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Preset: optimizer steps of the last stage.")
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Preset: weight of the PRe loss.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Preset: processes, a thread each; default one a core.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not resume what is there.")] = False,
) -> None:
    """Train: a preset's paired experiment with its report, or one run from a file.

    Run again after an interruption: it goes on from the last checkpoint.
    """
    if (preset is None) == (config is None):
        raise ValueError("--preset, --config: expected exactly one of them")
    console = Console()
    if config is not None:
        for name, value in (
            ("seeds", seeds), ("steps", steps), ("weight", weight), ("workers", workers)
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"--{name}: goes with --preset; in a file, set it there")
        _single(config, out, fresh, console)
    else:
        assert preset is not None
        _experiment(preset, out, seeds, steps, weight, workers, fresh, console)


def _single(path: Path, out: Path | None, fresh: bool, console: Console) -> None:
    from prereg_kernels.training.config import load_config
    from prereg_kernels.training.evaluation import evaluate
    from prereg_kernels.training.loop import train as train_run
    from prereg_kernels.training.scenes import Scenes

    settings = load_config(path)
    out = out or Path("runs") / path.stem
    result = train_run(settings, out, resume=not fresh)
    test = Scenes("test", settings.seed, settings.scenes)
    answers = evaluate(result.model, result.packer, test, list(settings.families))
    for family, accuracy in answers.accuracy.items():
        console.print(
            f"{family}: {accuracy:.1%} (always the commonest: {answers.majority[family]:.1%})"
        )
    console.print(f"LM loss {answers.lm_loss:.3f} nats; model in {result.checkpoint}")


def _experiment(
    preset: str,
    out: Path | None,
    seeds: int | None,
    steps: int | None,
    weight: float | None,
    workers: int | None,
    fresh: bool,
    console: Console,
) -> None:
    import torch

    from prereg_kernels.training.cost import measure_cost
    from prereg_kernels.training.experiment import open_experiment
    from prereg_kernels.training.report import write_report
    from prereg_kernels.training.tower import trained_tower
    from prereg_kernels.training.workers import run_units

    start = time.perf_counter()
    settings = _load_preset(preset)
    run = settings.run
    if steps is not None:
        stages = (*run.stages[:-1], replace(run.stages[-1], steps=steps))
        run = replace(run, stages=stages)
    if weight is not None:
        run = replace(run, pre=replace(run.pre, weight=weight))
    settings = replace(settings, run=run, seeds=settings.seeds if seeds is None else seeds)
    out = out or Path("runs") / Path(preset).stem
    open_experiment(settings, out, fresh)

    workers = workers or max(1, len(os.sched_getaffinity(0)))
    torch.set_num_threads(workers)
    with console.status("the vision tower learns to see"):
        tower = trained_tower(run.model, run.scenes, run.tower, out / "cache")
    seen = ", ".join(f"{name} {share:.1%}" for name, share in tower.accuracy.items())
    console.print(f"vision tower ({tower.seconds:.0f} s): {seen}", highlight=False)
    run_units(settings, out, workers, console)
    with console.status("measuring what a step costs"):
        cost = measure_cost(settings, out)
    page = write_report(settings, cost, time.perf_counter() - start, out, console)
    console.print(f"report: {page}")


def _load_preset(name: str) -> Any:
    """The experiment of that name, or of a YAML file."""
    from prereg_kernels.training.config import load_config
    from prereg_kernels.training.experiment import ExperimentConfig

    if name.endswith((".yaml", ".yml")):
        return load_config(Path(name), ExperimentConfig)
    folder = files("prereg_kernels.training") / "presets"
    known = sorted(item.name.removesuffix(".yaml") for item in folder.iterdir())
    if name not in known:
        raise ValueError(
            f"--preset: expected one of {', '.join(known)}, or a YAML file; got {name}"
        )
    with as_file(folder / f"{name}.yaml") as path:
        return load_config(path, ExperimentConfig)
