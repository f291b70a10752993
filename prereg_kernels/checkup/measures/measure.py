# SPDX-License-Identifier: Apache-2.0
"""What a measure is: what it reads, how batches combine, and where its number is shown and said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from prereg_kernels.checkup.intervals import Estimate, Sums
from prereg_kernels.checkup.measures.lens import LensSums

CHECKUP, DEMO, SWEEP = "checkup", "demo", "sweep"
EVERYWHERE = frozenset({CHECKUP, DEMO, SWEEP})

STRUCTURE, STATES = "structure", "states"
"""The groups of the demo's results. The report draws the first over depth, and has tables of both.
"""


@dataclass(frozen=True)
class Tokens:
    """The visual tokens of a batch at one layer: what a measure reads.

    Attributes:
        features: (N, D).
        inputs: (N, D), the same tokens as they entered the LLM.
        images: (N,) the number of each one's image, 0 to `count` - 1; each image has tokens.
        count: of images.
        objects: (N,) the object that each one sees in its image, -1 = background.
        mean: (D,) the mean over all patches of all images; only for sources that read objects.
        lens: the logit lens of features, by the model's final norm and head.
    """

    features: Tensor
    inputs: Tensor
    images: Tensor
    count: int
    objects: Tensor
    mean: Tensor | None = None
    lens: Callable[[Tensor], LensSums] | None = None


Part = Mapping[str, Tensor]
"""What is kept of a batch: small tensors by name."""


@dataclass(frozen=True)
class Counted:
    """A source that adds up over all tokens. Its measures have no interval.

    Attributes:
        name: of the part in files.
        keep: a batch's part. combine: from all parts to the record that measures read.
    """

    name: str
    keep: Callable[[Tokens], Part]
    combine: Callable[[Sequence[Part]], Any]

    def of(self, tokens: Tokens) -> Any:
        """The record of features that are all in memory."""
        return self.combine([self.keep(tokens)])


@dataclass(frozen=True)
class PerImage:
    """A source of sums over each image's tokens. Its measures have a bootstrap interval.

    Attributes:
        name: of the part in files.
        keep: a batch's part: (images,) float64 sums by name, 0 where an image has nothing to say.
        read: from sums over images, an array a name, to the record that measures read.
        of: the same record of features that are all in memory.
        objects: whether it reads `objects` and `mean`: in a second pass, over batches with objects.
    """

    name: str
    keep: Callable[[Tokens], Part]
    read: Callable[[Sums], Any]
    of: Callable[[Tokens], Any]
    objects: bool = False


@dataclass(frozen=True)
class Sampled:
    """A source that reads a few patches of each image, all at once. No interval.

    Attributes:
        prepare: what it needs of the sample of layer 0.
        compare: from a layer's sample and that to the record that measures read.
    """

    prepare: Callable[[Tensor], Any]
    compare: Callable[[Tensor, Any], Any]

    def of(self, tokens: Tokens) -> Any:
        """The record of features that are all in memory."""
        return self.compare(tokens.features, self.prepare(tokens.inputs))


class Panel(NamedTuple):
    """Axes that curves over depth are drawn on.

    Attributes:
        picture: that it is part of.
        title, label: above it, and at its vertical axis.
        bottom, top: limits of that axis. reach: it ends at this, or higher where curves do.
        wide: logarithmic where values differ by more than 20 times.
    """

    picture: str
    title: str
    label: str
    bottom: float | None = None
    top: float | None = None
    reach: float | None = None
    wide: bool = False


class Reading(NamedTuple):
    """A measure at the input and at the layer that sentences speak of.

    Attributes:
        change: since the input; NaN without interval where images cannot be resampled.
        at: any other measure, by name, at that layer.
    """

    layer: int
    before: Estimate
    after: Estimate
    change: Estimate
    at: Callable[[str], Estimate]


class Tile(NamedTuple):
    """A number of the page's first row: what it is, at the input and at the middle layer.

    Attributes:
        direction: of the change, where its interval excludes 0.
    """

    title: str
    before: str
    after: str
    note: str
    direction: int = 0


@dataclass(frozen=True)
class Measure:
    """One number a layer.

    Attributes:
        name: what it is called, everywhere.
        source: what it is read from.
        value: from the source's record to the number, or to an array of them.
        unit: "%" for a share; else what the demo writes at its axis.
        shown: where: in the checkup, the demo (in its checkups during training too), the sweep.
        group: of the demo's results.
        panel: a key of `PANELS`, where the checkup draws it; dashed: as the second line there.
        sentence: what the checkup says of it, a function or the generic sentence's subject.
        compared: what the comparison of two models calls it; it needs an interval.
        tile: what the page's first row shows of it.
    """

    name: str
    source: Counted | PerImage | Sampled
    value: Callable[[Any], Any] = lambda record: record
    unit: str = ""
    shown: frozenset[str] = EVERYWHERE
    group: str = STATES
    panel: str | None = None
    dashed: bool = False
    sentence: str | Callable[[Reading], str] | None = None
    compared: str | None = None
    tile: Callable[[str, Reading], Tile] | None = None

    @property
    def scale(self) -> float:
        """What it is multiplied by to be shown: shares are in percent."""
        return 100 if self.unit == "%" else 1

    @property
    def digits(self) -> str:
        """How it is written then."""
        return ".1f" if self.unit == "%" else ".3f"
