# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the checkup's measures of one layer, at the size of a 7B model.

    python -m benchmarks.studies.checkup_measures [--images 174] [--columns 4096] [--output FILE]

174 images of 576 patches, 100,224 rows in batches of 7 images: the layer's features and those that
entered the LLM are drawn batch by batch, twice (the means come first), and never held. Seconds are
each measure's own, without the drawing. The logit lens and the probe have sizes of their own, since
one is a matmul with the whole vocabulary and the other does not depend on the patches.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.report import RESULTS, write_json
from prereg_kernels._util.machine import describe_machine
from prereg_kernels.checkup import (
    LensSums,
    MeanSums,
    NormSums,
    SimilaritySums,
    SpectrumSums,
    StructureSums,
    probe,
)
from prereg_kernels.demo.runs.memory import peak_memory

OUT = RESULTS / "checkup_measures.json"
PATCHES = 576  # of an image
OBJECTS = 8
IMAGES = 7  # of a batch
LENS_ROWS, VOCABULARY = 4032, 32_000
PROBE_ROWS, CLASSES = 2000, 20


class Batch(NamedTuple):
    """Whole images: the features of the layer and of the input, and whose patches they are."""

    features: Tensor
    reference: Tensor
    objects: Tensor
    images: Tensor


def batches(images: int, columns: int) -> Iterator[Batch]:
    """Objects around a common component in the input; blurred into it at the layer."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(columns, generator=generator)
    for first in range(0, images, IMAGES):
        count = min(IMAGES, images - first)
        centres = torch.randn(count * OBJECTS, columns, generator=generator)
        ids = torch.arange(count).repeat_interleave(PATCHES)
        objects = torch.randint(-1, OBJECTS, (len(ids),), generator=generator)
        reference = torch.randn(len(ids), columns, generator=generator) + common
        reference += centres[ids * OBJECTS + objects.clamp_min(0)]
        features = torch.randn(len(ids), columns, generator=generator)
        features += 0.5 * reference + 3 * common
        yield Batch(features, reference, objects, ids)


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's result; its time is added to the name's."""
        start = time.perf_counter()
        result = call(*arguments)
        self.seconds[name] += time.perf_counter() - start
        return result


def measure_layer(images: int, columns: int, clock: Clock) -> dict[str, Any]:
    """All tensor measures of one layer, as the checkup streams them; their values."""
    sums = MeanSums(), MeanSums()
    for batch in batches(images, columns):
        clock("means", lambda b: (sums[0].update(b.features), sums[1].update(b.reference)), batch)
    means = sums[0].result(), sums[1].result()

    structure, norms, similarity = StructureSums(means[0]), NormSums(), SimilaritySums(means)
    own, input_ = SpectrumSums(), SpectrumSums()
    for b in batches(images, columns):
        clock("structure", structure.update, b.features, b.objects, b.images)
        clock("norms", norms.update, b.features)
        clock("spectrum", own.update, b.features)
        clock("spectrum of the input", input_.update, b.reference)
        clock("similarity", similarity.update, b.features, b.reference)
    found = (
        clock("structure", structure.result),
        clock("norms", norms.result),
        clock("spectrum", own.result),
        clock("similarity", similarity.result, own, input_),
    )
    return {type(values).__name__: values._asdict() for values in found}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=174)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    before = peak_memory()
    clock, others = Clock(), Clock()
    values = measure_layer(arguments.images, arguments.columns, clock)
    peak = peak_memory()

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, arguments.columns, generator=generator)
    states = torch.randn(LENS_ROWS, arguments.columns, generator=generator)
    others("logit lens", LensSums(torch.nn.Identity(), weight).update, states)
    labels = torch.randint(CLASSES, (PROBE_ROWS,), generator=generator)
    pooled = torch.randn(PROBE_ROWS, arguments.columns, generator=generator)
    pooled += 0.1 * torch.randn(CLASSES, arguments.columns, generator=generator)[labels]
    others("probe", probe, pooled, labels)

    result = {
        "machine": describe_machine(torch.device("cpu"), None) | {"threads": arguments.threads},
        "rows": arguments.images * PATCHES,
        "columns": arguments.columns,
        "seconds": {name: round(s, 2) for name, s in clock.seconds.items()},
        "total_seconds": round(sum(clock.seconds.values()), 2),
        "peak_memory_bytes": peak,
        "peak_memory_before_bytes": before,
        "values": values,
        "logit lens": {
            "rows": LENS_ROWS,
            "columns": arguments.columns,
            "vocabulary": VOCABULARY,
            "seconds": round(others.seconds["logit lens"], 2),
        },
        "probe": {
            "rows": PROBE_ROWS,
            "columns": arguments.columns,
            "classes": CLASSES,
            "splits": 5,
            "seconds": round(others.seconds["probe"], 2),
        },
    }
    print(json.dumps(result, indent=1))
    write_json(result, arguments.output)


if __name__ == "__main__":
    main()
