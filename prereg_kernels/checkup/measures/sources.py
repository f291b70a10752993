# SPDX-License-Identifier: Apache-2.0
"""What the measures are read from: parts of batches, and how they combine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prereg_kernels.checkup.measures.lens import Lens
from prereg_kernels.checkup.measures.mean import MeanSums
from prereg_kernels.checkup.measures.measure import (
    Counted,
    Part,
    PerImage,
    Sampled,
    Tokens,
)
from prereg_kernels.checkup.measures.norms import MassiveDimension, Norms, NormSums
from prereg_kernels.checkup.measures.pooled import pool
from prereg_kernels.checkup.measures.similarity import Similarity, SimilaritySums
from prereg_kernels.checkup.measures.spectrum import Spectrum, SpectrumSums
from prereg_kernels.checkup.measures.structure import PatchStructure, StructureSums


def per_token(name: str, values: Callable[[Tensor, Tensor], Tensor]) -> PerImage:
    """The mean over tokens of a value each.

    Args:
        name: of the part in files.
        values: from (N, D) features and inputs to (N,).
    """

    def keep(tokens: Tokens) -> Part:
        x = values(tokens.features, tokens.inputs)
        means = pool(x[:, None], tokens.images)[0][:, 0].double()
        count = tokens.images.bincount(minlength=tokens.count).double()
        return {"sum": means * count, "tokens": count}

    def of(tokens: Tokens) -> float:
        return float(values(tokens.features, tokens.inputs).mean())

    return PerImage(name, keep, lambda sums: sums["sum"] / sums["tokens"], of)


COSINE = per_token(
    "cosine", lambda x, inputs: F.cosine_similarity(x.float(), inputs.float(), dim=1)
)


def _norms(tokens: Tokens) -> Part:
    sums = NormSums().update(tokens.features)
    dimensions = torch.tensor(sums.dimensions, dtype=torch.float64).reshape(-1, 3)
    return {
        "norms": sums.norms,
        "massive": torch.tensor(sums.massive_tokens),
        "dimensions": dimensions,
    }


def _all_norms(parts: Sequence[Part]) -> Norms:
    rows = [row for part in parts for row in part["dimensions"].tolist()]
    return Norms.of(
        torch.cat([part["norms"] for part in parts]),
        sum(int(part["massive"]) for part in parts),
        [MassiveDimension(int(d), int(tokens), largest) for d, tokens, largest in rows],
    )


NORMS = Counted("norms", _norms, _all_norms)


def _top(tokens: Tokens) -> Part:
    assert tokens.lens is not None
    return {"top": torch.tensor(list(tokens.lens(tokens.features).times.items()))}


def _lens(parts: Sequence[Part]) -> Lens:
    times: Counter[int] = Counter()
    for part in parts:
        for token, count in part["top"].tolist():
            times[token] += count
    return Lens.of(times)


LENS = Counted("lens", _top, _lens)


def _structure(tokens: Tokens) -> Part:
    sums = torch.zeros(tokens.count, 4, dtype=torch.float64)
    pairs = torch.zeros(tokens.count, 2, dtype=torch.float64)
    for image in range(tokens.count):
        rows = (tokens.images == image).nonzero().squeeze(1)
        objects = tokens.objects[rows]
        if (objects >= 0).any():
            one = StructureSums(tokens.mean).update(tokens.features[rows], objects)
            pairs[image] = torch.tensor(one.pairs)
            means = torch.tensor(one.result(), dtype=torch.float64)
            sums[image] = means.nan_to_num() * pairs[image].repeat(2)  # NaN: over no pair
    named = dict(zip(PatchStructure._fields, sums.T, strict=True))
    return {**named, "within": pairs[:, 0], "between": pairs[:, 1]}


def _whole_structure(tokens: Tokens) -> PatchStructure:
    sums = StructureSums(tokens.mean)
    return sums.update(tokens.features, tokens.objects, tokens.images).result()


STRUCTURE = PerImage("structure", _structure, PatchStructure.of, _whole_structure, objects=True)


class Sums(NamedTuple):
    """Rows with their mean and scatter matrix."""

    rows: Tensor
    mean: Tensor
    spectrum: SpectrumSums


def _sums(x: Tensor) -> Sums:
    return Sums(x, MeanSums().update(x).result(), SpectrumSums().update(x))


def _resemblance(x: Tensor, first: Sums) -> tuple[Spectrum, Similarity]:
    """Holds three (D, D) matrices: layer 0's, this layer's, theirs."""
    own = first if x is first.rows else _sums(x)
    similarity = SimilaritySums((own.mean, first.mean)).update(x, first.rows)
    return own.spectrum.result(), similarity.result(own.spectrum, first.spectrum)


SPECTRA = Sampled(_sums, _resemblance)
