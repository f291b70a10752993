# SPDX-License-Identifier: Apache-2.0
"""The checkup: every layer of a model, measured on images, as numbers, pictures and one page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from prereg_kernels._util.files import printable
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.resolver import resolve
from prereg_kernels.checkup.batches import Batches
from prereg_kernels.checkup.collect import Which, collect
from prereg_kernels.checkup.fingerprint import digest, of_code, of_model
from prereg_kernels.checkup.measured import Measured
from prereg_kernels.checkup.results import CheckupResults, differences, results_of
from prereg_kernels.checkup.shards import Shards

_LOG = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Gets (phase, steps done, steps in all)."""

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
    shown: Which = SHOWN,
    settings: Mapping[str, Any] | None = None,
    family: Family | None = None,
    notes: Sequence[str] = (),
    progress: Progress = lambda phase, done, total: None,
) -> CheckupResults:
    """Measure every layer of a model on images, in bounded memory, and remember it on disk.

    Run again with the same arguments after an interruption, it goes on from the last whole batch.
    What was measured with other weights, batches or code, or another config or device, is not
    touched: everything is measured anew beside it, and a line of the log says why. `report` makes
    the page of the results of one model or of two.

    Args:
        model: in eval mode, on the device to run on.
        batches: a list of `Batch`, or an object that makes each when asked for.
        out: a directory; what is measured goes to a directory below `shards/<name>/` in it.
        name: of the model, on the page and in the file names.
        images: in all batches, about; by default they are counted. It decides how many patches of
            an image the spectrum is sampled from.
        tokenizer: to show the logit lens's words.
        splits: of the linear probes.
        shown: how many images have maps on the page, or the names of those that have. Other ones
            cost a forward of their batches, and nothing is measured anew.
        settings: what else the numbers depend on, such as what forward hooks of yours do: a
            checkup that goes on has the same.
        family: where a model outside of the table keeps things, as `apply_pre` takes it.
        notes: for the page's reader.

    Raises:
        ValueError: features that are not finite, facts that do not fit the tokens, a forward that
            fails, or no image that can be used.
        TypeError: `shown` is a single name.
        OSError: a file cannot be written.

    Example:
        >>> from prereg_kernels.checkup import (
        ...     Batch, ImageFacts, checkup, token_norms, visual_features,
        ... )
        >>> facts = tuple(ImageFacts(name) for name in ("cat.jpg", "dog.jpg"))
        >>> results = checkup(model.eval(), [Batch(batch, facts)], "out", name="mine")
        >>> results.name, len(results.norms)  # the LLM's input and its 4 layers
        ('mine', 5)
        >>> results.norms[3].median == token_norms(visual_features(model, batch)[3]).median
        True
    """
    if isinstance(shown, str):  # a sequence of letters
        raise TypeError(f"shown: expected a number or a list of names, got {shown!r}")
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; call model.eval()")
    count = len(batches)
    data, counted = _data(batches, images is None)
    images = counted if images is None else images
    depends_on = {
        **of_code(),
        **of_model(model),
        "device": next(model.parameters()).device.type,
        **data,
        "limit": images,
        **(settings or {}),
    }
    if family is not None:
        family = resolve(model, family).family
        paths = family.language_model, family.layers, family.visual_tokens
        depends_on["family"] = digest(paths)
    shards = Shards(Path(out) / "shards" / name, depends_on)
    if shards.changed:
        _LOG.warning(
            f"{printable(name)}: measured anew, for what was measured in {printable(out)} before "
            f"had other {' and '.join(shards.changed)}"
        )
    collect(
        model,
        batches,
        shards,
        images=images,
        shown=shown,
        family=family,
        progress=lambda done, total: progress("images", done, total),
    )
    measured = Measured(shards, count, splits, shown)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        progress("measures", steps, 0)

    return results_of(printable(name), measured, tokenizer, notes, step)


def _data(batches: Batches, count: bool) -> tuple[Mapping[str, str], int]:
    """The fingerprint of the batches, and, where it is asked for, how many images are in them."""
    given: Mapping[str, str] | None = getattr(batches, "fingerprint", None)
    if given is not None and not count:
        return given, 0
    images, content = 0, []
    for i in range(len(batches)):
        batch = batches[i]
        images += len(batch.images)
        if given is None:
            content.append(digest(batch))
    return ({"batches": digest(content)} if given is None else given), images


def report(
    out: str | Path,
    results: Sequence[CheckupResults],
    facts: Mapping[str, Any] | None = None,
    *,
    pixels: Mapping[str, tuple[int, int]] | None = None,
) -> Path:
    """Write checkup.json, plots/ and checkup.html of one model, or of two to compare.

    Args:
        results: what `checkup` returned, of one model or of two.
        facts: {what: value} for the page's first lines.
        pixels: {name of a shown image: (x, y) from its upper left corner}: its maps show what
            resembles the patch there. Else it is the middle patch of the largest object.

    Returns:
        The page.

    Raises:
        ValueError: two that were not measured on the same images, or have other depths or other
            numbers of tokens of an image; a pixel that no patch covers.

    Example:
        >>> from prereg_kernels.checkup import Batch, ImageFacts, checkup, report
        >>> facts = tuple(ImageFacts(name) for name in ("cat.jpg", "dog.jpg"))
        >>> results = checkup(model.eval(), [Batch(batch, facts)], "out")
        >>> report("out", [results], {"model": "tiny LLaVA"}).name
        'checkup.html'
    """
    from prereg_kernels.checkup.report.page import write_page

    if len(results) not in (1, 2):
        raise ValueError(f"results: expected one model's, or two to compare, got {len(results)}")
    apart = differences(*results) if len(results) == 2 else {}
    return write_page(Path(out), results, apart, facts or {}, pixels or {})
