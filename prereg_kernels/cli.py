"""The command line: `prereg train`, `prereg diagnose`, `prereg doctor`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NoReturn

from prereg_kernels._version import __version__


def main() -> None:
    """Run the command; errors are one line on standard error, exit code 2 (130: stopped)."""
    arguments = _parser().parse_args()
    if arguments.command == "doctor":
        from prereg_kernels.doctor import doctor

        doctor(arguments.json)
        return
    if arguments.command == "diagnose":
        _diagnose(arguments)
        return
    try:
        from rich.console import Console

        from prereg_kernels.training.checkpoint import CheckpointError
        from prereg_kernels.training.loop import TrainingInterrupted
        from prereg_kernels.training.workers import Interrupted, UnitError
    except ModuleNotFoundError as error:
        _fail(f"{error}; training needs: pip install 'prereg-kernels[train]'")

    try:
        console = Console()
        train(arguments, console if console.is_terminal else Console(width=120))
    except (Interrupted, TrainingInterrupted, KeyboardInterrupt) as stop:
        _fail(str(stop) or "stopped", 130)
    except (ValueError, TypeError, OSError, CheckpointError, UnitError) as error:
        _fail(str(error))


def _diagnose(arguments: argparse.Namespace) -> None:
    try:
        from rich.console import Console

        from prereg_kernels.diagnose import run
    except ModuleNotFoundError as error:
        _fail(f"{error}; diagnose needs: pip install 'prereg-kernels[diagnostics]'")
    try:
        console = Console()
        run(arguments, console if console.is_terminal else Console(width=120))
    except KeyboardInterrupt:
        _fail(f"stopped; what was measured is in {arguments.out}; run again to go on", 130)
    except (ValueError, OSError) as error:
        _fail(str(error))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(message)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"prereg: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="prereg", description="Predictive Regularization for multimodal LLMs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train with PRe",
        description="Train: a preset's paired experiment with its report, or one run from a file. "
        "Run again after an interruption: it goes on from the last checkpoint.",
    )
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument("--preset", help="a paired experiment: scenes, or a YAML file of your own")
    source.add_argument("--config", type=Path, help="a YAML file: one run with these settings")
    train.add_argument("--out", type=Path, help="where everything goes; default: runs/<name>")
    train.add_argument("--device", help="with --config: cpu, cuda, ...; default: cuda if there")
    train.add_argument("--fresh", action="store_true", help="do not resume what is there")
    group = train.add_argument_group("with --preset")
    group.add_argument("--seeds", type=int, help="number of paired seeds")
    group.add_argument("--steps", type=int, help="optimizer steps of the last stage")
    group.add_argument("--weight", type=float, help="weight of the PRe loss")
    group.add_argument("--workers", type=int, help="processes, a thread each; default: one a core")
    _add_diagnose(commands)
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, and what runs here",
        description="Versions, CPU, GPU and backends: what runs here, and why the rest does not.",
    )
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def _add_diagnose(commands: Any) -> None:
    parser = commands.add_parser(
        "diagnose",
        help="what a model's visual tokens still hold, layer by layer",
        description="The checkup: linear probes, patch structure, similarity to the input and the "
        "logit lens at every layer; writes checkup.html, checkup.json and plots/. Run again after "
        "an interruption: it goes on from the last batch.",
    )
    parser.add_argument("model", type=Path, help="a model directory: config and safetensors")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="a directory of images, perhaps one a class")
    source.add_argument(
        "--scenes", action="store_true", help="the demo's digit scenes, with exact masks"
    )
    parser.add_argument(
        "--masks",
        type=Path,
        help="a directory of PNG masks at the images' paths, or COCO's annotations.json",
    )
    parser.add_argument(
        "--masks-are",
        choices=("instances", "classes"),
        default="instances",
        help="what a mask's numbers are: objects of one image, or classes (COCO-Stuff)",
    )
    parser.add_argument(
        "--background",
        type=int,
        nargs="*",
        default=[0, 255],
        metavar="N",
        help="numbers in PNG masks that are no object; default: 0 255",
    )
    parser.add_argument("--labels", type=Path, help="classes of images: CSV name,class, or JSON")
    parser.add_argument("--compare", type=Path, metavar="MODEL", help="a second model directory")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the models, on the page")
    parser.add_argument("--out", type=Path, required=True, help="where everything goes")
    parser.add_argument(
        "--limit", type=int, default=512, help="images, drawn from all; default 512"
    )
    parser.add_argument("--batch", type=int, default=8, help="images in a batch; default 8")
    parser.add_argument(
        "--purity",
        type=float,
        default=0.5,
        help="share of a patch that its object must own; default 0.5",
    )
    parser.add_argument("--splits", type=int, default=5, help="of each linear probe; default 5")
    parser.add_argument("--processor", type=Path, help="a directory with the image processor")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: as stored; float32 on a CPU",
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on from what is there")
    parser.add_argument("--json", action="store_true", help="print checkup.json, nothing else")


def train(arguments: argparse.Namespace, console: Any) -> None:
    """The command `prereg train`."""
    if arguments.preset is not None:
        if arguments.device is not None:
            raise ValueError("--device: goes with --config; a preset runs on the CPU")
        _experiment(arguments, console)
        return
    for name in ("seeds", "steps", "weight", "workers"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name}: goes with --preset; with --config, set it in the file")
    _single(arguments, console)


def _single(arguments: argparse.Namespace, console: Any) -> None:
    import torch

    from prereg_kernels.training.config import RunConfig, load_config
    from prereg_kernels.training.evaluation import evaluate
    from prereg_kernels.training.loop import train as train_run
    from prereg_kernels.training.scenes import Scenes

    settings = load_config(arguments.config, RunConfig)
    out = arguments.out or Path("runs") / arguments.config.stem
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} is not usable here: {error}") from None
    result = train_run(settings, out, resume=not arguments.fresh, device=device)
    test = Scenes("test", settings.seed, settings.scenes)
    answers = evaluate(result.model, result.packer, test, list(settings.families))
    for family, accuracy in answers.accuracy.items():
        console.print(
            f"{family}: {accuracy:.1%} (always the commonest: {answers.majority[family]:.1%})"
        )
    console.print(f"LM loss {answers.lm_loss:.3f} nats; model in {result.checkpoint}")


def _experiment(arguments: argparse.Namespace, console: Any) -> None:
    import torch

    from prereg_kernels.training.cost import measure_cost
    from prereg_kernels.training.experiment import open_experiment
    from prereg_kernels.training.report import write_report
    from prereg_kernels.training.tower import trained_tower
    from prereg_kernels.training.workers import run_units

    start = time.perf_counter()
    settings = _with_overrides(_load_preset(arguments.preset), arguments)
    run = settings.run
    out = arguments.out or Path("runs") / Path(arguments.preset).stem
    workers = arguments.workers or len(os.sched_getaffinity(0))
    if workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {workers}")
    open_experiment(settings, out, arguments.fresh)

    torch.set_num_threads(1)  # at these widths a second thread costs more than it brings
    with console.status("the vision tower learns to see"):
        tower = trained_tower(run.model, run.scenes, run.tower, out / "cache")
    seen = ", ".join(f"{name} {share:.1%}" for name, share in tower.accuracy.items())
    console.print(f"vision tower ({tower.seconds:.0f} s): {seen}", highlight=False)
    run_units(settings, out, workers, console)
    with console.status("measuring what a step costs"):
        cost = measure_cost(settings, out)
    page = write_report(settings, cost, time.perf_counter() - start, out, console)
    console.print(f"report: {page}")


def _with_overrides(settings: Any, arguments: argparse.Namespace) -> Any:
    run = settings.run
    if arguments.steps is not None:
        stages = (*run.stages[:-1], replace(run.stages[-1], steps=arguments.steps))
        run = replace(run, stages=stages)
    if arguments.weight is not None:
        run = replace(run, pre=replace(run.pre, weight=arguments.weight))
    seeds = settings.seeds if arguments.seeds is None else arguments.seeds
    return replace(settings, run=run, seeds=seeds)


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
