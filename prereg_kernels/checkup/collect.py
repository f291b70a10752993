# SPDX-License-Identifier: Apache-2.0
"""From batches to shards: two passes over the images, a layer's features never kept whole.

The first pass keeps, of each batch, what is small: a mean feature an image and an object, a few
rows an image for the measures that need a scatter matrix, and the parts of the table's sources. Its
means give the mean patch; the second pass keeps the parts of the sources that read objects and it.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prereg_kernels._util import private
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.resolver import resolve
from prereg_kernels.checkup.batches import Batch, Batches
from prereg_kernels.checkup.features import visual_features, visual_mask
from prereg_kernels.checkup.measures.lens import LensSums
from prereg_kernels.checkup.measures.measure import Counted, PerImage, Tokens
from prereg_kernels.checkup.measures.pooled import pool
from prereg_kernels.checkup.measures.table import MEASURES
from prereg_kernels.checkup.model_files import in_words
from prereg_kernels.checkup.shards import Shards

Which = int | Sequence[str]
"""How many of the first images, or the names of images."""
Progress = Callable[[int, int], None]
"""Gets (batches done, batches in all), both passes counted."""

ROWS = 8192
"""Patches, spread over all images, that the spectrum and CKA are computed from."""


KEPT = {m.source.name: m.source for m in MEASURES if isinstance(m.source, (Counted, PerImage))}
"""The sources of which a part is kept of each batch, by name."""


@dataclass(frozen=True)
class _Run:
    """A batch's features: L + 1 layers of (N, D), and which of the B images each row is of."""

    layers: list[Tensor]
    image: Tensor  # (N,)
    batch: Batch

    def rows(self, image: int) -> Tensor:
        return (self.image == image).nonzero().squeeze(1)

    @cached_property
    def objects(self) -> Tensor:
        """(N,) the object of each row in its image, -1 = background or not known."""
        objects = torch.full_like(self.image, -1)
        for b, facts in enumerate(self.batch.images):
            if facts.objects is not None:
                objects[self.rows(b)] = torch.from_numpy(facts.objects)
        return objects

    def parts(
        self, lens: Callable[[Tensor], LensSums] | None = None, mean: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Of every layer, the parts of the sources that read objects, or of the others.

        Args:
            lens: as in `Tokens`, for the others.
            mean: (L + 1, D), for those that read objects.
        """
        parts = {}
        for depth, layer in enumerate(self.layers):
            tokens = Tokens(
                layer,
                self.layers[0].to(layer),
                self.image.to(layer.device),
                len(self.batch.images),
                self.objects.to(layer.device),
                None if mean is None else mean[depth],
                lens,
            )
            for name, source in KEPT.items():
                if (isinstance(source, PerImage) and source.objects) == (mean is not None):
                    for key, x in source.keep(tokens).items():
                        parts[f"{name}.{key}.{depth}"] = x
        return parts


def collect(
    model: nn.Module,
    batches: Batches,
    shards: Shards,
    *,
    images: int,
    shown: Which,
    family: Family | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the shards that are not there yet.

    Args:
        images: in all batches together, at most.
        family: of a model outside of the table.
        shown: of so many of the first usable images, or of the images of these names, every patch
            is kept, for the page. The other shards do not depend on it.

    Raises:
        ValueError: features that are not finite, facts that do not fit the tokens, no images, or
            none of a name in `shown`.
        OSError: a shard cannot be written.
    """
    per_image = max(1, math.ceil(ROWS / max(1, images)))
    total = 2 * len(batches)
    names: list[str] = []
    for index in range(len(batches)):
        name = first_pass(index)
        run = None
        if not shards.has(name):
            batch = batches[index]
            run = _run(model, batch, family)
            if run is None:
                shards.write(name, {}, {"images": [], "skipped": batch.skipped})
            else:
                tensors, facts = _first(run, logit_lens_of(model, family), per_image)
                shards.write(name, tensors, facts)
        here = shards.facts(name)["images"]
        for b in chosen(shown, here, len(names)):
            if not shards.has(map_of(index, b)):
                run = run or _run(model, batches[index], family)
                assert run is not None
                shards.write(map_of(index, b), _mapped(run, b), {})
        names += here
        progress(index + 1, total)
    absent = () if isinstance(shown, int) else sorted(set(shown) - set(names))
    if absent:
        raise ValueError(f"shown: expected names of measured images, got {', '.join(absent)}")
    mean = mean_patch(shards, len(batches))
    for index in range(len(batches)):
        name = second_pass(index)
        if not shards.has(name):
            facts = shards.facts(first_pass(index))
            parts = {}
            if facts.get("objects"):
                run = _run(model, batches[index], family)
                assert run is not None
                parts = run.parts(mean=mean)
            shards.write(name, parts, {})
        progress(len(batches) + index + 1, total)


def first_pass(index: int) -> str:
    """The name of a batch's first shard."""
    return f"states-{index:06d}"


def map_of(index: int, b: int) -> str:
    """The name of the shard of an image that is shown: the `b`-th usable one of a batch."""
    return f"map-{index:06d}-{b:03d}"


def chosen(shown: Which, names: Sequence[str], before: int) -> list[int]:
    """Which images of a batch are shown, after so many in the batches before."""
    if isinstance(shown, int):
        return list(range(min(len(names), max(0, shown - before))))
    return [b for b, name in enumerate(names) if name in shown]


def second_pass(index: int) -> str:
    """The name of a batch's second shard."""
    return f"structure-{index:06d}"


def mean_patch(shards: Shards, count: int) -> Tensor:
    """(L + 1, D) float64: the mean over all patches of all images."""
    total: Tensor | None = None
    rows = 0
    skipped: Counter[str] = Counter()
    for index in range(count):
        facts = shards.facts(first_pass(index))
        skipped.update(reason for _, reason in facts["skipped"])
        if not facts["images"]:
            continue
        tokens = shards.read(first_pass(index), "tokens")
        means = shards.read(first_pass(index), "image_means").double()
        part = (means * tokens[:, None]).sum(dim=1)
        total = part if total is None else total + part
        rows += int(tokens.sum())
    if total is None:
        reasons = "; ".join(f"{times} {reason}" for reason, times in skipped.most_common(3))
        raise ValueError(f"images: expected at least one that can be used, got none: {reasons}")
    return total / rows


def _run(model: nn.Module, batch: Batch, family: Family | None) -> _Run | None:
    if not batch.images:
        return None
    devices = (parameter.device for parameter in model.parameters())
    # accelerate keeps weights of other places on the meta device, and moves inputs itself
    device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))
    inputs = {
        name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.inputs.items()
    }
    mask = visual_mask(model, inputs, family)
    image = mask.nonzero()[:, 0].cpu()
    if len(batch.images) != len(mask):
        raise ValueError(
            f"batch: expected facts of {len(mask)} images, the rows of input_ids, got "
            f"{len(batch.images)}"
        )
    tokens = mask.sum(dim=1).tolist()
    for facts, count in zip(batch.images, tokens, strict=True):
        if not count:
            raise ValueError(f"{facts.name}: expected visual tokens in input_ids, got none")
        for known, name in ((facts.grid, "the places"), (facts.objects, "objects")):
            if known is not None and len(known) != count:
                raise ValueError(
                    f"{facts.name}: expected {name} of its {count} visual tokens, got "
                    f"{len(known)} of them"
                )
    try:
        layers = visual_features(model, inputs, family)
    except ValueError:
        raise
    except Exception as error:  # a config that does not fit the weights' use, no memory, ...
        names = f"{batch.images[0].name} to {batch.images[-1].name}"
        raise ValueError(f"{names}: the model's forward failed: {in_words(error)}") from error
    for depth, layer in enumerate(layers):
        bad = ~torch.isfinite(layer).all(dim=1)
        if bad.any():
            name = batch.images[int(image[bad.cpu()][0])].name
            raise ValueError(
                f"{name}: the features of layer {depth} are not finite in {layer.dtype}; load the "
                "model in another dtype (--dtype float32)"
            )
    return _Run(layers, image, batch)


def _first(
    run: _Run, lens: Callable[[Tensor], LensSums], per_image: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is kept of a batch after the first pass."""
    images = range(len(run.batch.images))
    rows = [run.rows(b) for b in images]
    picked = torch.cat(
        [
            r[_draw(facts.name, len(r), per_image)]
            for r, facts in zip(rows, run.batch.images, strict=True)
        ]
    )
    objects, labels, owner = _objects(run)
    stacks: dict[str, list[Tensor]] = defaultdict(list)
    for layer in run.layers:
        # layers may be on several devices
        stacks["image_means"].append(pool(layer, run.image)[0].cpu())
        stacks["object_means"].append(pool(layer, objects)[0].cpu())
        stacks["sample"].append(layer[picked].cpu())
    tensors = {name: torch.stack(parts) for name, parts in stacks.items()}
    tensors.update(run.parts(lens))
    tensors["tokens"] = torch.tensor([len(r) for r in rows])
    tensors["object_owner"] = owner
    facts = {
        "images": [f.name for f in run.batch.images],
        "labels": [dict(f.labels) for f in run.batch.images],
        "objects": labels,
        "skipped": run.batch.skipped,
    }
    return tensors, facts


def _objects(run: _Run) -> tuple[Tensor, list[dict[str, str]], Tensor]:
    """Objects of the batch: (N,) their numbers or -1, {target: class} of each, and its image."""
    number = torch.full((len(run.image),), -1)
    labels: list[dict[str, str]] = []
    owner: list[int] = []
    for b, facts in enumerate(run.batch.images):
        if facts.objects is None:
            continue
        rows = run.rows(b)
        mine = torch.from_numpy(facts.objects)
        for thing in sorted(set(mine[mine >= 0].tolist())):
            number[rows[mine == thing]] = len(labels)
            of_thing = {
                target: classes[thing]
                for target, classes in facts.object_labels.items()
                if thing in classes
            }
            labels.append(of_thing)
            owner.append(b)
    return number, labels, torch.tensor(owner, dtype=torch.int64)


def logit_lens_of(model: Any, family: Family | None = None) -> Callable[[Tensor], LensSums]:
    """The logit lens of a layer's features, through the model's own norm and head."""
    language_model = resolve(model, family).family.language_model_of(model)
    norm = private.submodules(language_model).get("norm")
    head: Any = model.get_output_embeddings()
    if norm is None:
        raise ValueError(f"model: {type(language_model).__name__} has no final norm at .norm")
    assert isinstance(norm, nn.Module)

    def lens(features: Tensor) -> LensSums:
        with _there(head), torch.no_grad():
            weight = head.weight
            if hasattr(head, "base_layer"):  # of PEFT: what it adds is in its forward alone
                rows = head(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))
                weight = (rows if head.bias is None else rows - head.bias).T
            return LensSums(norm, weight, head.bias).update(features.to(weight.device))

    return lens


def _there(module: nn.Module) -> AbstractContextManager[object]:
    """Its weights, where accelerate keeps them somewhere else until its forward."""
    if all(parameter.device.type != "meta" for parameter in module.parameters()):
        return nullcontext()
    from accelerate.utils import align_module_device

    return cast("AbstractContextManager[object]", align_module_device(module))


def _mapped(run: _Run, b: int) -> dict[str, Tensor]:
    """What the page needs to draw an image: all its patches, and where they are."""
    rows, facts = run.rows(b), run.batch.images[b]
    arrays: dict[str, NDArray[Any]] = {}
    if facts.picture is not None:
        arrays["picture"] = facts.picture
    if facts.grid is not None:
        arrays["boxes"] = facts.grid.boxes
        arrays["places"] = np.stack([facts.grid.row, facts.grid.column])
        arrays["grid"] = np.array(facts.grid.shape)
    if facts.objects is not None:
        arrays["objects"] = facts.objects
    patches = torch.stack([layer[rows].float().cpu() for layer in run.layers])
    return {"patches": patches, **{name: torch.from_numpy(x.copy()) for name, x in arrays.items()}}


def _draw(name: str, count: int, wanted: int) -> Tensor:
    """`wanted` of `count` indices, drawn by the image's name: equal for every model; all of them
    where there are no more."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(errors="surrogatepass")))
    return torch.randperm(count, generator=generator)[:wanted].sort().values
