"""The checkup: every layer of a model, measured on images, as numbers, pictures and one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prereg_kernels._version import __version__
from prereg_kernels.diagnostics.batches import Batches
from prereg_kernels.diagnostics.collect import collect
from prereg_kernels.diagnostics.measured import Measured
from prereg_kernels.diagnostics.results import Diagnosis, diagnose, differences
from prereg_kernels.diagnostics.shards import Shards

Progress = Callable[[str, int, int], None]
"""Told of (phase, steps done, steps in all)."""

SHOWN = 2
"""Images of which maps are drawn."""


def checkup(
    model: nn.Module,
    batches: Batches,
    out: str | Path,
    *,
    name: str = "model",
    images: int | None = None,
    tokenizer: Any = None,
    splits: int = 5,
    shown: int = SHOWN,
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    progress: Progress = lambda phase, done, total: None,
) -> Diagnosis:
    """Measure every layer of a model on images, in bounded memory, and remember it on disk.

    Run again with the same arguments after an interruption, it goes on from the last whole batch.
    `report` makes the page of one diagnosis or of two.

    Args:
        model: of a supported family, in eval mode, on the device to run on.
        batches: a list of `Batch`, or an object that makes each when asked for.
        out: a directory; what is measured goes to `shards/<name>/` in it.
        name: of the model, on the page and in the file names.
        images: in all batches, about; by default they are counted. It decides how many patches of
            an image the spectrum is sampled from.
        tokenizer: to show the logit lens's words.
        splits: of the linear probes.
        shown: images of which every patch is kept, for maps.
        settings: what distinguishes this checkup from others in the same directory, such as the
            weights and the data: a resumed one must have the same.
        notes: for the page's reader.

    Raises:
        ValueError: features that are not finite, facts that do not fit the tokens, no image that
            can be used, or shards of other settings.
        OSError: a file cannot be written.
    """
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; call model.eval()")
    count = len(batches)
    if images is None:
        images = sum(len(batches[i].images) for i in range(count))
    asked = {
        "prereg_kernels": __version__,  # another may measure, or keep, something else
        "batches": count,
        "images": images,
        "shown": shown,
        **(settings or {}),
    }
    shards = Shards(Path(out) / "shards" / name, asked)
    collect(
        model,
        batches,
        shards,
        images=images,
        shown=shown,
        progress=lambda done, total: progress("images", done, total),
    )
    measured = Measured(shards, count, splits)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        progress("measures", steps, 0)

    return diagnose(name, measured, tokenizer, notes, step)


def report(
    out: str | Path, found: Sequence[Diagnosis], facts: Mapping[str, Any] | None = None
) -> Path:
    """Write checkup.json, plots/ and checkup.html of one diagnosis, or of two to compare.

    Args:
        facts: {what: value} for the page's first lines.

    Returns:
        The page.

    Raises:
        ValueError: two that were not measured on the same images, or have other depths.
    """
    from prereg_kernels.diagnostics.page import write_page  # matplotlib and jinja2

    if len(found) not in (1, 2):
        raise ValueError(f"found: expected one diagnosis, or two to compare, got {len(found)}")
    apart = differences(*found) if len(found) == 2 else {}
    return write_page(Path(out), found, apart, facts or {})
