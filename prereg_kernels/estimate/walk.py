# SPDX-License-Identifier: Apache-2.0
"""A model's structure, by steps that it takes on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prereg_kernels._util import private
from prereg_kernels.attach.anchors import anchor_width
from prereg_kernels.attach.config import PReConfig
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.resolver import resolve
from prereg_kernels.estimate.structure import NAMES, PARTS, Block, Counts, Polynomial, Structure
from prereg_kernels.estimate.trace import block_of, tracing

Batch = Mapping[str, Any]
KEPT = 6
"""Decoder layers that are looked at, where all are alike; the first ones may not quite be."""
LONGER = (64, 256, 768)
"""By how many words a batch is made longer, to see what grows with its length and how."""
CHUNK = 64
"""These lengths are multiples of it: linear attention fills up its last chunk of so many."""


def walk(
    model: Any,
    batches: Sequence[Batch],
    name: str,
    parts: Mapping[str, Sequence[str]],
    trains: Collection[str] = ("projector", "llm"),
    lengths: Sequence[int] | None = None,
) -> Structure:
    """What each block of the model costs.

    Args:
        model: an image-text model of transformers, on the meta device.
        batches: arguments of its forward, labels included, real tensors on the CPU. The first has
            images of the usual size. A second one, where an image of another size has other
            tokens, has such images.
        parts: {"tower", "projector", "llm": names of its parameters}.
        trains: of these parts.
        lengths: positions of a row in the steps that are taken, as many as the powers of a length
            that are told apart. None: some that are `LONGER`.

    Raises:
        ValueError: PRe does not know the model, or its step cannot be followed.
    """
    of_parameter = {parameter: part for part, names in parts.items() for parameter in names}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(of_parameter[parameter_name] in trains)
    family = resolve(model).family
    visual = [int(family.marked(model, batch).sum()) for batch in batches]
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, private.EXPERTS):
            setattr(config, private.EXPERTS, "grouped_mm")
    small = batches[-1]
    rows, length = small["input_ids"].shape
    if lengths is None:
        lengths = [-(-(length + more) // CHUNK) * CHUNK for more in LONGER]
    layers, sizes = str(family.layers), _sizes(model)
    parts_of_blocks = _parts_of_blocks(model, of_parameter)
    with _fewer(model, family.layers_of(model), layers) as repeated:
        runs = [trace_step(model, lengthened(small, new - length)) for new in lengths]
        more = lengths[0] - length
        images = [trace_step(model, lengthened(batch, more)) for batch in batches[:-1]]
    for run in (*runs, *images):
        for path, of in repeated.items():
            run[path] = run[of]
    blocks = []
    paths = dict.fromkeys((*(p for p in runs[0] if p), *sizes, ""))
    for path in sorted(paths, key=lambda path: _place(path, layers, list(runs[0]))):
        part, of_text = parts_of_blocks[path], [run.get(path) for run in runs]
        has_text = part == "llm" or any(found != of_text[0] for found in of_text)
        if has_text:
            counts = _fitted([_scaled(found, 1 / rows) for found in of_text], lengths)
        else:
            counts = _through_origin([*(run.get(path) for run in images), of_text[0]], visual)
        size, layer = sizes.get(path, 0), _layer(path, layers)
        blocks.append(Block(path or "loss", part, size, counts, layer, has_text))
    text = model.config.get_text_config(decoder=True)
    return Structure(
        name=name,
        blocks=tuple(blocks),
        layers=len(family.layers_of(model)),
        width=int(model.get_input_embeddings().weight.shape[1]),
        encoder_width=_encoder_width(family, model),
        vocabulary=int(text.vocab_size),
        visual_tokens=visual[0],
        grows=len(batches) > 1,
        itemsize=next(model.parameters()).dtype.itemsize,
        trains=tuple(part for part in PARTS if part in trains),
    )


def _encoder_width(family: Family, model: nn.Module) -> int | None:
    try:
        return anchor_width(PReConfig(anchor="pre_projector"), family, model)
    except ValueError:
        return None


def trace_step(model: nn.Module, batch: Batch) -> dict[str, Counts]:
    """Forward and backward of a batch."""
    with tracing(model) as blocks:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return blocks


def lengthened(batch: Batch, more: int) -> dict[str, Any]:
    """The batch with its first word so many times more, at the end."""
    shape = batch["input_ids"].shape

    def longer(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != shape or value.dim() != 2:
            return value
        return torch.cat((value, value[:, :1].expand(-1, more)), dim=1)

    return {key: longer(value) for key, value in batch.items()}


def _fitted(counts: Sequence[Counts], numbers: Sequence[int]) -> dict[str, Polynomial]:
    """Polynomials through all of the counts."""
    powers = np.vander(np.array(numbers, dtype=float), increasing=True)
    values = np.array([[getattr(x, name) for name in NAMES] for x in counts])
    return _told(np.linalg.solve(powers, values), max(numbers))


def _through_origin(counts: Sequence[Counts | None], numbers: Sequence[int]) -> dict[str, Any]:
    powers = np.array([[float(n) ** (i + 1) for i in range(len(numbers))] for n in numbers])
    values = np.array([[getattr(x or Counts(), name) for name in NAMES] for x in counts])
    solved = np.linalg.solve(powers, values)
    return _told(np.concatenate((np.zeros((1, len(NAMES))), solved)), max(numbers))


def _told(coefficients: Any, largest: int) -> dict[str, Polynomial]:
    """Those that are there, without what is rounding."""
    found = {}
    for name, column in zip(NAMES, coefficients.T.tolist(), strict=True):
        terms = [abs(x) * largest**power for power, x in enumerate(column)]
        kept = [
            float(f"{x:.9g}") if term > 1e-7 * max(terms) else 0.0
            for x, term in zip(column, terms, strict=True)
        ]
        while kept and not kept[-1]:
            kept.pop()
        if kept:
            found[name] = tuple(kept)
    return found


def _scaled(counts: Counts | None, factor: float) -> Counts:
    return Counts(**{name: factor * getattr(counts or Counts(), name) for name in NAMES})


def _sizes(model: nn.Module) -> dict[str, int]:
    """{block: its parameters}; one that is used twice is the first one's."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        block = block_of(name.rpartition(".")[0])
        sizes[block] = sizes.get(block, 0) + parameter.numel()
    return sizes


def _parts_of_blocks(model: nn.Module, of_parameter: Mapping[str, str]) -> dict[str, str]:
    """{block: its part}; what has parameters of several, or none, is the LLM's."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." * bool(path)
        own = {of_parameter.get(f"{prefix}{name}", "llm") for name, _ in module.named_parameters()}
        outer = found.get(block_of(path.rpartition(".")[0]), "llm") if path else "llm"
        part = own.pop() if len(own) == 1 else outer if not own else "llm"
        found.setdefault(block_of(path), part)
    return found


@contextmanager
def _fewer(model: Any, layers: nn.ModuleList, path: str) -> Iterator[dict[str, str]]:
    """Only the first decoder layers, where all are alike: {each other one: one that it is like}."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    shapes = {tuple((n, p.shape) for n, p in layer.named_parameters()) for layer in layers}
    if len(layers) <= KEPT or len(shapes) > 1 or len(set(kinds)) > 1:
        yield {}
        return
    holder, _, name = path.rpartition(".")
    setattr(model.get_submodule(holder), name, layers[:KEPT])
    try:
        yield {f"{path}.{n}": f"{path}.{KEPT - 2}" for n in range(KEPT - 1, len(layers))}
    finally:
        setattr(model.get_submodule(holder), name, layers)


def _place(path: str, layers: str, run: Sequence[str]) -> tuple[int, int, int]:
    """In the order of a forward pass: as blocks ran; the loss last, and what did not run first."""
    if not path:
        return 2, 0, 0
    layer = _layer(path, layers)
    first = f"{layers}.0"
    if layer:
        return 1, run.index(first), layer
    return (1, run.index(path), 0) if path in run else (0, 0, 0)


def _layer(path: str, layers: str) -> int:
    holder, _, number = path.rpartition(".")
    return int(number) + 1 if holder == layers and number.isdecimal() else 0
