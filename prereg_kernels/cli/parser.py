# SPDX-License-Identifier: Apache-2.0
"""The commands' flags, and what `--help` says of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from prereg_kernels._version import __version__
from prereg_kernels.cli import estimate
from prereg_kernels.cli.ending import fail
from prereg_kernels.cli.launch import COMMANDS

OLD_NAME = "diagnose"
"""What `prereg checkup` was called in version 0.1."""
_EVERY_SETTING = (
    "Every setting of the file is a flag as well, by its path: {}. What the file says is the "
    "default. --settings lists them all with their values."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def make_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = _Parser(prog="prereg", description="Predictive Regularization for multimodal LLMs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    _add_train(commands)
    demo = commands.add_parser(
        "demo",
        help="train a small LLaVA on scenes of digits, with and without PRe",
        description="The demo: a preset's paired experiment with its report, or one run of a file. "
        "Run again after an interruption: it goes on from the last checkpoint.",
        epilog=_EVERY_SETTING.format("--run.pre.weight 0.5 --run.stages.1.steps 100"),
        allow_abbrev=False,  # `--seed` is a setting of a run, and not short for `--seeds`
    )
    source = demo.add_mutually_exclusive_group()
    source.add_argument(
        "--preset",
        help="a paired experiment: scenes (the default), scenes-gpu, scenes-gpu-text, or a YAML "
        "file of your own",
    )
    source.add_argument("--config", type=Path, help="a YAML file: one run with these settings")
    demo.add_argument("--out", type=_named, help="where everything goes; default: runs/<name>")
    demo.add_argument(
        "--device", help="cpu, cuda, ...; default: the preset's; with --config, cuda if there"
    )
    demo.add_argument("--fresh", action="store_true", help="do not resume what is there")
    _add_settings(demo)
    group = demo.add_argument_group("with --preset")
    _add_size(group)
    group.add_argument("--weight", type=float, help="weight of the PRe loss")
    _add_sweep(commands)
    _add_checkup(commands)
    estimate.add_parser(commands)
    doctor = commands.add_parser(
        "doctor",
        help="what is installed and runs here; whether a model is supported",
        description="Versions, CPU, GPU and backends: what runs here, and why the rest does not. "
        "With a model directory: whether PRe works on the model, and where the model keeps things. "
        "Its weights are not read. Exit status 1 says that PRe does not work on it.",
    )
    doctor.add_argument(
        "model", type=Path, nargs="?", help="a model directory: config and, if there, processor"
    )
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    for name, (_, help) in COMMANDS.items():
        commands.add_parser(name, help=help)  # which main has taken, with flags of its own
    commands.add_parser(
        "swift-plugin",
        help="the path of ms-swift's plugin",
        description="Print the path for swift's --external_plugins, which puts PRe in its trainer.",
    )
    commands.add_parser(
        "build",
        help="compile the C++ kernels for CPUs",
        description="Compile the C++ kernels for CPUs against the torch that is installed. Needs a "
        "C++ compiler. In a checkout the libraries go into the package, otherwise into "
        "TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions. What is up to date is kept.",
    )
    return parser


def _named(text: str) -> Path:
    """A path, but for the empty one, which would be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a directory, got an empty name")
    return Path(text)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings", action="store_true", help="list every setting as a flag, and stop"
    )


def _add_size(group: Any) -> None:
    group.add_argument("--seeds", type=int, help="number of paired seeds")
    group.add_argument("--steps", type=int, help="optimizer steps of the last stage")
    group.add_argument(
        "--workers", type=int, help="processes, a thread each; default: one a core, or one a GPU"
    )


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a multimodal LLM with PRe on your data",
        description="Train the stages of a YAML file. Run again after an interruption: it goes on "
        "from the last checkpoint. torchrun and accelerate start it on several processes, as the "
        "module prereg_kernels.",
        epilog="Every setting of the file is a flag as well, by its path: --trainer.max_steps 10, "
        "--stages.1.learning_rate 1.0e-5, --pre.weight 0.3. A flag replaces what the "
        "file has there; a stage's own field still wins over `trainer` and `pre`.",
        allow_abbrev=False,
    )
    train.add_argument("config", type=Path, help="a YAML file")
    train.add_argument("--out", type=_named, help="where everything goes; default: the file's")
    train.add_argument("--fresh", action="store_true", help="begin anew, not from what is there")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: say what would be trained on what, and which files are missing",
    )
    assemble = commands.add_parser(
        "assemble",
        help="a LLaVA of a vision encoder and an LLM, for a first stage of training",
        description="Put a vision encoder and an LLM together as a LLaVA, with a new projector, an "
        "image token, a processor and a chat template.",
    )
    assemble.add_argument("--vision", required=True, help="CLIP or SigLIP: a directory or a name")
    assemble.add_argument("--llm", required=True, help="a decoder: a directory or a hub's name")
    assemble.add_argument("--out", type=_named, required=True, help="the new model's directory")
    assemble.add_argument("--seed", type=int, default=0, help="of the projector; default 0")

    evaluate = commands.add_parser(
        "evaluate",
        help="how many questions of held-out data a model answers",
        description="Ask a model the last question of each sample of held-out data. Writes "
        "evaluation.json and predictions.jsonl. Or, with --tasks, lmms-eval's questions; writes "
        "tasks.json.",
    )
    evaluate.add_argument("model", type=Path, help="a model directory, such as a run's")
    source = evaluate.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="a file, a folder or a hub's data set")
    source.add_argument("--tasks", help="of lmms-eval, which is installed: gqa,mmvp")
    evaluate.add_argument("--task-files", type=Path, help="a folder of lmms-eval's task files")
    evaluate.add_argument("--limit", type=int, help="questions of each task; default: all")
    evaluate.add_argument("--format", default="llava", help="llava (the default), messages, ...")
    evaluate.add_argument("--images", help="the folder that image paths start from")
    evaluate.add_argument("--out", type=_named, help="where it writes; default: the model's")
    evaluate.add_argument("--batch", type=int, default=8, help="questions at once; default 8")
    evaluate.add_argument("--device", help="cpu, cuda, ...; default: cuda if there")
    evaluate.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the weights' own"
    )


def _add_sweep(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="how PRe's effect moves with its settings",
        description="Train over PRe's weights, layers, anchors and token fractions, one at a time, "
        "against baselines paired by seed; writes results.json, tables.md and plots/. Run again "
        "after an interruption: it goes on with what is not finished.",
        epilog=_EVERY_SETTING.format("--weights 0.5 1 2 --experiment.run.micro_batch 16"),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", required=True, help="scenes, scenes-gpu, or a YAML file of your own"
    )
    parser.add_argument(
        "--out", type=_named, help="where everything goes; default: runs/sweep-<name>"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default: the preset's")
    parser.add_argument("--fresh", action="store_true", help="do not go on from what is there")
    _add_settings(parser)
    parser.add_argument(
        "--report", action="store_true", help="train nothing: only report what is finished"
    )
    _add_size(parser)


def _add_checkup(commands: Any) -> None:
    parser = commands.add_parser(
        "checkup",
        aliases=[OLD_NAME],
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
        help="what a mask's numbers are: objects of one image, the default, or classes "
        "(COCO-Stuff)",
    )
    parser.add_argument(
        "--background",
        type=int,
        nargs="*",
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
        help="share of a patch that its object must own; default 0.5",
    )
    parser.add_argument("--splits", type=int, default=5, help="of each linear probe; default 5")
    parser.add_argument(
        "--maps",
        nargs="+",
        metavar="IMAGE[@X,Y]",
        help="images whose maps are drawn, each perhaps with a pixel of the patch that the others "
        "are compared with; default: the first two",
    )
    parser.add_argument("--processor", type=Path, help="a directory with the image processor")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: as stored; float32 on a CPU",
    )
    parser.add_argument(
        "--device-map",
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
        help="spread the layers over all GPUs, by accelerate; instead of --device",
    )
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), help="round linear layers as they load, by bitsandbytes"
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on from what is there")
    parser.add_argument("--json", action="store_true", help="print checkup.json, nothing else")
