"""What a trained model's visual tokens still hold, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from prereg_kernels.diagnostics import linear_probe, patch_structure, visual_features
from prereg_kernels.training.data import IMAGE, Packer, pixel_values
from prereg_kernels.training.scenes import ATTRIBUTES, Scenes

PROPERTIES = ("digit", *ATTRIBUTES)
"""What the probes read: the class that questions ask for, then the attributes that none does."""


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
    model: LlavaForConditionalGeneration,
    packer: Packer,
    scenes: Scenes,
    count: int,
    batch: int = 64,
) -> LayerFeatures:
    """Run the model on the images of the first `count` scenes; it sees no question."""
    image_id = packer.tokenizer.convert_tokens_to_ids(IMAGE)
    chunks: list[list[Tensor]] = []
    owners: list[Tensor] = []
    labels: dict[str, list[Tensor]] = {name: [] for name in PROPERTIES}
    for first in range(0, count, batch):
        part = scenes.batch(range(first, min(first + batch, count)))
        ids = torch.full((len(part), packer.image_tokens), image_id, device=model.device)
        pixels = pixel_values(part.images).to(model.device)
        features = visual_features(model, {"input_ids": ids, "pixel_values": pixels})
        chunks.append([layer.float().cpu() for layer in features])
        owners.append(torch.from_numpy(part.patch_objects))
        for name in PROPERTIES:
            labels[name].append(torch.from_numpy(part.fields[name]))
    owner = torch.cat(owners)  # (B, P)
    slots = labels["digit"][0].shape[1]
    scene = torch.arange(len(owner))[:, None].expand_as(owner)
    key = (scene * slots + owner)[owner >= 0]  # (scene, object) as one number
    present, member = key.unique(return_inverse=True)
    sizes = member.bincount()[:, None]

    patches = [torch.cat(layer) for layer in zip(*chunks, strict=True)]
    owned = owner.flatten() >= 0
    objects = [
        layer.new_zeros(len(present), layer.shape[1]).index_add_(0, member, layer[owned]) / sizes
        for layer in patches
    ]
    tables = {name: torch.cat(tables).flatten()[present] for name, tables in labels.items()}
    return LayerFeatures(patches, owner.flatten(), scene.flatten(), objects, tables)


def measure(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    train: Scenes,
    test: Scenes,
    *,
    train_scenes: int,
    test_scenes: int,
) -> dict[str, dict[str, list[float]]]:
    """Probes and patch structure at every layer, 0 (the LLM's input) to the last.

    Returns:
        "probe": {property: test accuracy of a linear probe on object features, per layer};
        "structure": {"cohesion", "coupling", "contrast", "difference", and the same on features
        from which the mean over all patches was subtracted, as "centred ...", per layer};
        "states": {"cosine to input", "norm": means over visual tokens, per layer}.
    """
    fit = layer_features(model, packer, train, train_scenes)
    held_out = layer_features(model, packer, test, test_scenes)
    probe = {
        name: [
            linear_probe(x, fit.labels[name], y, held_out.labels[name])
            for x, y in zip(fit.objects, held_out.objects, strict=True)
        ]
        for name in PROPERTIES
    }
    structure: dict[str, list[float]] = {}
    for prefix, centre in (("", False), ("centred ", True)):
        for layer in held_out.patches:
            x = layer - layer.mean(dim=0) if centre else layer
            found = patch_structure(x, held_out.owner, held_out.scene)
            for name in ("cohesion", "coupling", "contrast", "difference"):
                structure.setdefault(prefix + name, []).append(getattr(found, name))
    first = held_out.patches[0]
    states = {
        "cosine to input": [
            float(F.cosine_similarity(layer, first, dim=1).mean()) for layer in held_out.patches
        ],
        "norm": [float(layer.norm(dim=1).mean()) for layer in held_out.patches],
    }
    return {"probe": probe, "structure": structure, "states": states}
