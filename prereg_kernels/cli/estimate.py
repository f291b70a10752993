# SPDX-License-Identifier: Apache-2.0
"""The command `prereg estimate`: what a training step with PRe costs, before anything is bought."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable
from prereg_kernels._util.supported import not_imported
from prereg_kernels.attach.config import ANCHORS
from prereg_kernels.estimate import shipped
from prereg_kernels.estimate.devices import DEVICES
from prereg_kernels.estimate.estimate import estimate
from prereg_kernels.estimate.report import describe
from prereg_kernels.estimate.settings import DTYPES, OPTIMIZERS, PARALLEL, Settings
from prereg_kernels.estimate.structure import Structure

ENDINGS = (".png", ".svg")


def add_parser(commands: Any) -> None:
    """The command's flags; they and `Settings` have the same names."""
    parser = commands.add_parser(
        "estimate",
        help="what a training step with PRe takes: time, memory, FLOPs, communication",
        description="Time, memory, FLOPs and communication of a training step, and PRe's share of "
        "each, by a model's config. Nothing is downloaded, no weights are read, no GPU is needed.",
    )
    names = ", ".join(shipped.names())
    parser.add_argument(
        "model", help=f"a config.json, a directory with one, or one of {names}. No weights are read"
    )
    whole, one = parser.add_argument_group("the step"), parser.add_argument_group("PRe")
    add = whole.add_argument
    add("--images-per-step", type=int, help="of all GPUs together, one a sample; default 16 a GPU")
    add("--tokens", type=int, default=192, help="of text, of a sample; default 192")
    add("--visual-tokens", type=int, help="of an image; default: of the model's usual size")
    add("--gpus", type=int, default=1, help="how many; default 1")
    add("--gpu", choices=(*DEVICES, "cpu"), default="h100", help="default h100")
    add("--parallel", choices=PARALLEL, default="ddp", help="how GPUs share the work; default ddp")
    add("--checkpointing", action="store_true", help="the decoder's layers are computed again")
    add("--train", default="projector,llm", help="of tower, projector, llm; default projector,llm")
    add(
        "--weights", choices=tuple(DTYPES), default="bfloat16",
        help="as they are kept, default bfloat16; products are of bfloat16, a CPU's of the weights",
    )  # fmt: skip
    add("--optimizer", choices=tuple(OPTIMIZERS), default="adamw", help="default adamw")
    add = one.add_argument
    add("--layer", type=int, dest="pre_layer", help="counted from 1; default: the middle one")
    add("--anchor", choices=ANCHORS, default="pre_llm", help="what the head predicts")
    add("--head-features", type=int, help="the head's inner width; default: the decoder's")
    add("--depth", type=int, default=2, help="matrices of the head; default 2")
    add("--head-dtype", choices=tuple(DTYPES), default="float32", help="default float32")
    add("--token-fraction", type=float, default=1.0, help="of the visual tokens; default 1")
    parser.add_argument("--json", action="store_true", help="the same, and more, as JSON")
    parser.add_argument(
        "--picture", type=Path, help="draw memory over the step, a .png or .svg; needs matplotlib"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: an argument, or the model, is not as expected.
        OSError: a file cannot be read or written.
    """
    settings = settings_of(arguments)
    picture: Path | None = arguments.picture
    if picture is not None and picture.suffix not in ENDINGS:
        raise ValueError(f"--picture: expected a .png or .svg, got {printable(picture.name)}")
    found = estimate(structure_of(arguments.model, settings), settings)
    if picture is not None:
        try:
            from prereg_kernels.estimate.picture import draw
        except ModuleNotFoundError as error:
            needs = "it needs: pip install 'prereg-kernels[checkup]'"
            raise ValueError(f"--picture: {not_imported(error, needs)}") from None
        draw(found, picture)
    print(json.dumps(found.describe(), indent=1) if arguments.json else describe(found))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Raises ValueError where one of them cannot be."""
    given = vars(arguments)
    train = tuple(part.strip() for part in given["train"].split(",") if part.strip())
    names = Settings.__dataclass_fields__
    return Settings(**{name: given[name] for name in names if name != "train"}, train=train)


def structure_of(model: str, settings: Settings) -> Structure:
    """Of a shipped model, at once; of any other by steps on the meta device.

    Raises:
        ValueError: there is none, or none of these products.
    """
    train, dtype = settings.train, settings.products
    if model in shipped.names():
        if dtype != "bfloat16":
            raise ValueError(
                f"--weights: expected bfloat16 with --gpu cpu for {model}, which was counted so; "
                f"got {dtype}. Give the model's config.json to have it counted anew"
            )
        return shipped.structure_of(model, train)
    path = Path(model)
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model: expected a config.json, a directory with one, or one of "
            f"{', '.join(shipped.names())}; got {printable(model)}"
        )
    print("prereg: the model takes some steps without weights first", file=sys.stderr)
    try:
        return _walked(path, train, dtype)
    except ModuleNotFoundError as error:
        needs = "one of your own needs: pip install 'prereg-kernels[checkup]'"
        raise ValueError(f"model: {not_imported(error, needs)}") from None


def _walked(directory: Path, train: Sequence[str], dtype: str) -> Structure:
    import torch

    from prereg_kernels._util.quiet import quiet
    from prereg_kernels.attach.resolver import resolve
    from prereg_kernels.checkup.model_files import offline
    from prereg_kernels.cli.doctor_model import model_class, read_config
    from prereg_kernels.cli.made_up import NotRunError, processed_batch
    from prereg_kernels.estimate.batches import made_up_batches
    from prereg_kernels.estimate.walk import walk
    from prereg_kernels.train.parts import parts_of

    with quiet(), offline(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config, _ = read_config(directory)
        config.get_text_config(decoder=True).use_cache = False
        _set_dtype(config, getattr(torch, dtype))
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device("meta"):
                model = model_class(directory, config)(config).train()
        finally:
            torch.set_default_dtype(before)
        family = resolve(model).family
        batches: list[dict[str, Any]]
        try:
            batches = made_up_batches(model, family)
        except ValueError:
            try:
                batches = [processed_batch(directory, config, model)]
            except NotRunError as reason:
                raise ValueError(f"model: there is no batch for it, since {reason}") from None
        return walk(model, batches, directory.resolve().name, parts_of(model), train)


def _set_dtype(config: Any, dtype: Any) -> None:
    """Of a config and its parts: what a model was saved in is not what it is trained in."""
    config.dtype = dtype
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            _set_dtype(part, dtype)
