# SPDX-License-Identifier: Apache-2.0
"""The command `prereg checkup`: the checkup of a model directory, or of two."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import dropwhile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from prereg_kernels._util.files import printable
from prereg_kernels._version import __version__
from prereg_kernels.checkup.batches import Batches
from prereg_kernels.checkup.images.coco import CocoImages
from prereg_kernels.checkup.images.datasets import (
    BACKGROUND,
    MASKS_ARE,
    ImageFolder,
    Samples,
    Subset,
)
from prereg_kernels.checkup.images.image_batches import PURITY, ImageBatches, check_same_inputs
from prereg_kernels.checkup.loading import Loaded, load, prepare
from prereg_kernels.checkup.report.findings import middle_layer, notes
from prereg_kernels.checkup.report.page import NUMBERS
from prereg_kernels.checkup.results import CheckupResults
from prereg_kernels.checkup.run import SHOWN, checkup, report
from prereg_kernels.checkup.shards import Shards

_PIXEL = re.compile(r"@(\d+),(\d+)$")
_CHECKPOINT = re.compile(r"checkpoints?|(checkpoint|step)-\d+")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Run the command.

    Raises:
        ValueError: arguments, files or features that are not as expected.
        OSError: a file cannot be read or written.
    """
    directories = [arguments.model, *([arguments.compare] if arguments.compare else [])]
    names = _names(directories, arguments.names)
    _check(arguments)
    if arguments.compare and not arguments.scenes:
        check_same_inputs(names, [prepare(path, arguments.processor) for path in directories])
    samples = None if arguments.scenes else _samples(arguments)
    pixels = _pixels(arguments.maps or (), samples)
    if arguments.fresh:
        for name in names:
            Shards.clear(arguments.out / "shards" / name)
    results: list[CheckupResults] = []
    for directory, name in zip(directories, names, strict=True):
        if not arguments.json:
            console.print(f"{printable(name)}: {printable(directory)}", highlight=False)
        results.append(_measure(directory, name, samples, arguments, console))
    page = report(arguments.out, results, _facts(results, arguments), pixels=pixels)
    numbers = (arguments.out / NUMBERS).read_text(encoding="utf-8")
    if arguments.json:
        console.out(numbers, highlight=False)
        return
    _print(results, json.loads(numbers)["headline"], console)
    console.print(f"page: {printable(page)}", highlight=False)


def _measure(
    directory: Path,
    name: str,
    samples: Samples | None,
    arguments: argparse.Namespace,
    console: Console,
) -> CheckupResults:
    loaded = load(
        directory,
        processor=arguments.processor,
        device=_device(arguments.device),
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
        device_map=arguments.device_map,
        bits=arguments.bits,
    )
    batches, notes = _batches(loaded, samples, arguments)
    with _bar(name, console, shown=not arguments.json) as progress:
        return checkup(
            loaded.model,
            batches,
            arguments.out,
            name=name,
            images=arguments.limit if samples is None else len(samples),
            tokenizer=loaded.tokenizer,
            splits=arguments.splits,
            shown=SHOWN if arguments.maps is None else list(_named(arguments.maps)),
            notes=notes,
            progress=progress,
        )


def _batches(
    loaded: Loaded, samples: Samples | None, arguments: argparse.Namespace
) -> tuple[Batches, Sequence[str]]:
    if samples is not None:
        batches = ImageBatches(
            loaded,
            samples,
            size=arguments.batch,
            purity=PURITY if arguments.purity is None else arguments.purity,
        )
        return batches, loaded.notes
    from prereg_kernels.demo.data.scene_batches import SceneBatches
    from prereg_kernels.demo.data.scenes import Scenes

    return SceneBatches(loaded.model, Scenes("test"), arguments.limit), ()


def _samples(arguments: argparse.Namespace) -> Samples:
    masks = arguments.masks
    samples: Samples
    if masks is not None and masks.suffix == ".json":
        samples = CocoImages(arguments.images, masks)
        if arguments.labels is not None:
            raise ValueError("--labels: goes with an image folder, not with COCO's annotations")
    else:
        samples = ImageFolder(
            arguments.images,
            labels=arguments.labels,
            masks=masks,
            masks_are=arguments.masks_are or MASKS_ARE[0],
            background=BACKGROUND if arguments.background is None else arguments.background,
            without=arguments.out,
        )
    return Subset(samples, arguments.limit) if arguments.limit < len(samples) else samples


def _named(maps: Sequence[str]) -> dict[str, tuple[int, int] | None]:
    """The images of --maps, and the pixel that each has behind an @."""
    named = {}
    for text in maps:
        at = _PIXEL.search(text)
        name = text[: at.start()] if at else text
        named[name] = (int(at[1]), int(at[2])) if at else None
    return named


def _pixels(maps: Sequence[str], samples: Samples | None) -> dict[str, tuple[int, int]]:
    """The pixels of --maps. ValueError: an image that is not measured."""
    named = _named(maps)
    if samples is not None:
        names = {samples.name(i) for i in range(len(samples))}
        for name in named:
            if name not in names:
                raise ValueError(
                    f"--maps: expected one of the {len(names)} images that are measured, such as "
                    f"{min(names)}, got {name}; --limit says how many are"
                )
    return {name: pixel for name, pixel in named.items() if pixel is not None}


def _check(arguments: argparse.Namespace) -> None:
    for name in ("limit", "batch", "splits"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.device_map is not None and arguments.device is not None:
        raise ValueError("--device-map: chooses the devices itself; expected no --device")
    if arguments.masks is None:
        for name in ("masks_are", "background", "purity"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')}: goes with --masks; got no masks")
    elif arguments.masks.suffix == ".json":
        for name in ("masks_are", "background"):
            if getattr(arguments, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')}: goes with masks in PNG files, not with COCO's "
                    "annotations"
                )
    if arguments.scenes:
        for name in ("masks", "labels", "processor"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name}: goes with --images; scenes bring their own")


def _names(directories: Sequence[Path], given: Sequence[str] | None) -> list[str]:
    """What the page calls the models: as little of their paths as tells them apart."""
    if given is not None:
        if len(given) != len(directories) or len(set(given)) != len(given):
            raise ValueError(
                f"--names: expected {len(directories)} different names, got {' '.join(given)}"
            )
        if any(not name.strip() or set(name) & set("/\\") or name[0] == "." for name in given):
            raise ValueError(f"--names: expected names without slashes, got {' '.join(given)}")
        return list(given)
    whole = [path.resolve().parts[:0:-1] for path in directories]
    if len(whole) == 2 and whole[0] == whole[1]:
        raise ValueError(f"--compare: expected another model than {directories[0]}")
    runs = [tuple(dropwhile(_CHECKPOINT.fullmatch, parts)) for parts in whole]
    for parts in (runs, whole) if all(map(len, runs)) else (whole,):
        if len(parts) == 1:
            return [parts[0][0]]
        for a, b in zip(*parts, strict=False):  # from the end of the paths
            if a != b:
                return [a, b]
    return ["first", "second"]


def _device(name: str | None) -> torch.device:
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        usable = torch.zeros(1, device=chosen)
        usable.item()  # not on the meta device
        return usable.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: {chosen!r} is not usable here: {error}") from None


def _facts(results: Sequence[CheckupResults], arguments: argparse.Namespace) -> dict[str, str]:
    measured = results[0].measured
    skipped = sum(map(len, measured.skipped.values()))
    source = "digit scenes" if arguments.scenes else str(arguments.images)
    return {
        "images": f"{len(measured.names)} of {source}" + (f" ({skipped} skipped)" * bool(skipped)),
        "visual tokens": f"{int(measured.tokens.sum()):,}",
        "layers": f"{measured.layers - 1} of width {measured.width}",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "prereg_kernels": __version__,
    }


@contextmanager
def _bar(name: str, console: Console, *, shown: bool) -> Iterator[Any]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not shown) as progress:
        tasks: dict[str, Any] = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(f"{printable(name)}: {phase}", total=total or None)
            progress.update(tasks[phase], completed=done)

        yield update


def _print(results: Sequence[CheckupResults], headline: str, console: Console) -> None:
    layer = middle_layer(results[0].layers)
    last = results[0].layers - 1
    console.print(printable(headline), highlight=False)
    table = Table()
    table.add_column("")
    for model in results:
        for depth in dict.fromkeys((0, layer, last)):
            where = "input" if depth == 0 else f"layer {depth}"
            table.add_column(f"{model.name}\n{where}", justify="right")
    keys = [key for key in results[0].curves if all(key in d.curves for d in results)]
    for key in keys:
        cells = []
        for model in results:
            for depth in dict.fromkeys((0, layer, last)):
                cells.append(f"{model.curves[key][depth].value:.3f}")
        table.add_row(printable(key), *cells)
    console.print(table)
    for model in results:
        for reason, names in model.measured.skipped.items():
            console.print(
                f"{model.name}: {len(names)} skipped: {reason} ({', '.join(names[:3])})",
                highlight=False,
            )
        for target, reason in model.missing.items():
            console.print(
                printable(f"{model.name}: no probe of {target}: {reason}"), highlight=False
            )
    for note in notes(results):
        console.print(printable(note), highlight=False)
