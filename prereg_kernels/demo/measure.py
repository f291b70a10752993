# SPDX-License-Identifier: Apache-2.0
"""What a trained model's visual tokens still hold, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from prereg_kernels.checkup import MeanSums, linear_probe, pool, visual_features
from prereg_kernels.checkup.collect import logit_lens_of
from prereg_kernels.checkup.measures.measure import DEMO, Tokens
from prereg_kernels.checkup.measures.table import at_layer
from prereg_kernels.demo.data.scene_batches import SceneBatches
from prereg_kernels.demo.data.scenes import PROPERTIES, Scenes


@dataclass(frozen=True)
class LayerFeatures:
    """Visual tokens of one split, at every layer.

    Attributes:
        patches: per layer (N, D).
        owner: (N,) which object of its scene each patch belongs to, -1 for background.
        scene: (N,) index of the scene.
        objects: per layer (O, D), the mean of each object's patches.
        labels: {property: (O,)}.
    """

    patches: list[Tensor]
    owner: Tensor
    scene: Tensor
    objects: list[Tensor]
    labels: dict[str, Tensor]


def layer_features(
    model: LlavaForConditionalGeneration, scenes: Scenes, count: int, batch: int = 64
) -> LayerFeatures:
    """Run the model on the images of the first `count` scenes; it sees no question."""
    batches = SceneBatches(model, scenes, count, batch)
    chunks: list[list[Tensor]] = []
    for part in (batches[i] for i in range(len(batches))):
        features = visual_features(model, {k: x.to(model.device) for k, x in part.inputs.items()})
        chunks.append([layer.float().cpu() for layer in features])
    patches = [torch.cat(layer) for layer in zip(*chunks, strict=True)]

    facts = scenes.batch(range(count))
    owner = torch.from_numpy(facts.patch_objects)  # (B, P)
    scene = torch.arange(count)[:, None].expand_as(owner)
    slots = facts.fields["digit"].shape[1]
    key = torch.where(owner >= 0, scene * slots + owner, -1).flatten()
    present = key[key >= 0].unique()
    objects = [pool(layer, key)[0] for layer in patches]
    labels = {name: torch.from_numpy(facts.fields[name]).flatten()[present] for name in PROPERTIES}
    return LayerFeatures(patches, owner.flatten(), scene.flatten(), objects, labels)


def measure(
    model: LlavaForConditionalGeneration,
    train: Scenes,
    test: Scenes,
    *,
    train_scenes: int,
    test_scenes: int,
) -> dict[str, dict[str, list[float]]]:
    """Probes and the demo's part of the table of measures at every layer, 0 (the LLM's input) to
    the last.

    Unlike the checkup's probes, which split one set of images, these are fitted on other scans.

    Returns:
        "probe": {property: test accuracy of a linear probe on object features, per layer}; for each
        group of measures, "structure" and "states", {measure: its number, per layer}.
    """
    fit = layer_features(model, train, train_scenes)
    held_out = layer_features(model, test, test_scenes)
    depth = range(len(fit.objects))
    groups: dict[str, dict[str, list[float]]] = {
        "probe": {
            name: [_probe(fit, held_out, name, layer) for layer in depth] for name in PROPERTIES
        }
    }
    for tokens in _tokens(held_out, model):
        for group, numbers in at_layer(tokens, DEMO).items():
            for name, number in numbers.items():
                groups.setdefault(group, {}).setdefault(name, []).append(number)
    return groups


def probes(
    model: LlavaForConditionalGeneration,
    train: Scenes,
    test: Scenes,
    *,
    layers: Sequence[int],
    scenes: int,
) -> dict[str, dict[int, float]]:
    """The probes of `measure` alone, at some layers: {property: {layer: test accuracy}}."""
    fit, held_out = (layer_features(model, split, scenes) for split in (train, test))
    return {
        name: {layer: _probe(fit, held_out, name, layer) for layer in layers} for name in PROPERTIES
    }


def _probe(fit: LayerFeatures, held_out: LayerFeatures, name: str, layer: int) -> float:
    x, y = fit.objects[layer], held_out.objects[layer]
    return linear_probe(x, fit.labels[name], y, held_out.labels[name])


def _tokens(features: LayerFeatures, model: nn.Module) -> Iterator[Tokens]:
    """What measures read, a layer at a time."""
    lens = logit_lens_of(model)
    for layer in features.patches:
        yield Tokens(
            layer,
            features.patches[0],
            features.scene,
            int(features.scene.max()) + 1,
            features.owner,
            MeanSums().update(layer).result(),
            lens,
        )
