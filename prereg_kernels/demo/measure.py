"""What a trained model's visual tokens still hold, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from prereg_kernels.checkup import linear_probe, patch_structure, pool, token_norms, visual_features
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
    """Probes and patch structure at every layer, 0 (the LLM's input) to the last.

    Unlike the checkup's probes, which split one set of images, these are fitted on other scans.

    Returns:
        "probe": {property: test accuracy of a linear probe on object features, per layer};
        "structure": {"cohesion", "coupling", "contrast", "difference", and the same on features
        from which the mean over all patches was subtracted, as "centred ...", per layer};
        "states": {"cosine to input", "norm": means over visual tokens, per layer}.
    """
    fit = layer_features(model, train, train_scenes)
    held_out = layer_features(model, test, test_scenes)
    probe = {
        name: [
            linear_probe(x, fit.labels[name], y, held_out.labels[name])
            for x, y in zip(fit.objects, held_out.objects, strict=True)
        ]
        for name in PROPERTIES
    }
    structure: dict[str, list[float]] = {}
    for layer in held_out.patches:
        found = patch_structure(layer, held_out.owner, held_out.scene)
        for prefix in ("", "centred_"):
            for name in ("cohesion", "coupling", "contrast", "difference"):
                key = prefix.replace("_", " ") + name
                structure.setdefault(key, []).append(getattr(found, prefix + name))
    first = held_out.patches[0]
    cosines = [F.cosine_similarity(layer, first, dim=1) for layer in held_out.patches]
    states = {
        "cosine to input": [float(cosine.mean()) for cosine in cosines],
        "norm": [token_norms(layer).mean for layer in held_out.patches],
    }
    return {"probe": probe, "structure": structure, "states": states}
