# SPDX-License-Identifier: Apache-2.0
"""The vision tower learns to see the digits, once, and is then shared by all runs.

Each patch that belongs to a digit must name its class, its four attributes and its cell, through a
linear head that is thrown away. The tower then carries more than the questions will ask for: what a
decoder trained on those questions does with the rest is what PRe is about.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from prereg_kernels._util import checked
from prereg_kernels._util.files import printable, read_json, write_whole
from prereg_kernels._util.settings_file import to_dict
from prereg_kernels.demo.config import RunConfig, TowerConfig
from prereg_kernels.demo.data.packing import build_tokenizer, pixel_values
from prereg_kernels.demo.data.scenes import ATTRIBUTES, SceneBatch, SceneConfig
from prereg_kernels.demo.model.llava import ModelConfig, build_model
from prereg_kernels.demo.schedule import cosine_with_warmup

TowerState = dict[str, Tensor]


@dataclass(frozen=True)
class TowerResult:
    """A trained tower.

    Attributes:
        state: its weights, for `load_state_dict` of the model's vision tower.
        accuracy: {property: accuracy per patch on test scenes, in [0, 1]}.
        seconds: time it took to train; 0.0 when it came from the cache.
    """

    state: TowerState
    accuracy: dict[str, float]
    seconds: float


def trained_tower(
    model: ModelConfig,
    scenes: SceneConfig,
    tower: TowerConfig,
    cache_dir: str | Path,
    *,
    on_step: Callable[[int, int], None] | None = None,
    device: str | torch.device = "cpu",
) -> TowerResult:
    """The tower for these settings, on the CPU, from `cache_dir` where it was trained before.

    Args:
        device: where it is trained if it is not there.
        on_step: called with (steps done, steps in all) after each step.

    A file there that is damaged is written again, with a warning.
    """
    settings = json.dumps([to_dict(model), to_dict(scenes), to_dict(tower)], sort_keys=True)
    digest = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
    path = Path(cache_dir) / f"tower-{digest}.safetensors"
    if path.is_dir():
        raise ValueError(f"{printable(path)}: expected a file, got a directory")
    if path.exists():
        with torch.device("meta"):
            like = build_model(model, scenes, build_tokenizer(scenes), tower.seed)
        try:
            return _read_tower(path, like.model.vision_tower.state_dict())
        except (OSError, ValueError) as error:
            warnings.warn(
                f"{printable(path)} is damaged: {error}; the tower is trained again", stacklevel=2
            )
    result = train_tower(model, scenes, tower, on_step=on_step, device=device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, checked.to_bytes(result.state, {"accuracy": result.accuracy}))
    return result


def new_model(
    config: RunConfig,
    cache_dir: str | Path,
    *,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
) -> LlavaForConditionalGeneration:
    """The model that a run begins with: its tower trained, projector and decoder not.

    Args:
        cache_dir: as in `trained_tower`.
        attention: the implementation's name.
        device: where the model is put, and the tower trained.
    """
    tokenizer = build_tokenizer(config.scenes)
    model = build_model(config.model, config.scenes, tokenizer, config.seed, attention=attention)
    tower = trained_tower(config.model, config.scenes, config.tower, cache_dir, device=device)
    model.model.vision_tower.load_state_dict(tower.state)
    return model.to(device)


def _read_tower(path: Path, wanted: TowerState) -> TowerResult:
    """Raise ValueError unless the file holds a tower like `wanted`, and how well it sees."""
    state, facts = checked.read(path, {"accuracy"})
    if facts is None:  # as of version 0.1.0
        facts = read_json(path.with_suffix(".json"))
    checked.check_finite(state)
    if {n: (x.shape, x.dtype) for n, x in state.items()} != {
        n: (x.shape, x.dtype) for n, x in wanted.items()
    }:
        raise ValueError("its tensors are not those of the tower")
    accuracy = facts.get("accuracy") if isinstance(facts, dict) else None
    names = {"digit", *ATTRIBUTES, "cell"}
    if not isinstance(accuracy, dict) or accuracy.keys() != names:
        raise ValueError(f"expected the accuracy of {sorted(names)}, got {accuracy!r}")
    return TowerResult(state, {name: float(share) for name, share in accuracy.items()}, 0.0)


def train_tower(
    model: ModelConfig,
    scenes: SceneConfig,
    tower: TowerConfig,
    *,
    on_step: Callable[[int, int], None] | None = None,
    device: str | torch.device = "cpu",
) -> TowerResult:
    """Train a tower from random weights. A function of its arguments alone."""
    start = time.perf_counter()
    vision = build_model(model, scenes, build_tokenizer(scenes), tower.seed).model.vision_tower
    vision.to(device)
    classes = {"digit": 10, **{name: len(values) for name, values in ATTRIBUTES.items()}}
    # Questions ask for cells, so patches should know theirs; position embeddings alone say it less
    # directly, since a jittered tile crosses the borders of its cell.
    classes["cell"] = scenes.grid**2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tower.seed)
        head = nn.Linear(model.width, sum(classes.values())).to(device)
    dense = replace(
        scenes,
        min_digits=min(tower.min_digits, scenes.grid**2),
        max_digits=min(tower.max_digits, scenes.grid**2),
    )
    train = dense.open("train", tower.seed)
    parameters = [*vision.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=tower.lr, betas=(0.9, 0.98), weight_decay=tower.weight_decay, fused=True
    )
    for step in range(tower.steps):
        for group in optimizer.param_groups:
            group["lr"] = tower.lr * cosine_with_warmup(step, tower.steps, tower.warmup)
        batch = train.batch(range(step * tower.batch, (step + 1) * tower.batch))
        loss = torch.zeros((), device=device)
        for name, (logits, labels) in _logits_and_labels(vision, head, classes, batch).items():
            weight = tower.digit_weight if name == "digit" else 1.0
            loss = loss + weight * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, tower.steps)
    with torch.no_grad():
        held_out = scenes.open("test", tower.seed).batch(range(256))
        pairs = _logits_and_labels(vision, head, classes, held_out)
    accuracy = {
        name: float((logits.argmax(dim=1) == labels).float().mean())
        for name, (logits, labels) in pairs.items()
    }
    state = {
        name: tensor.detach().to("cpu", copy=True) for name, tensor in vision.state_dict().items()
    }
    return TowerResult(state, accuracy, time.perf_counter() - start)


def _logits_and_labels(
    vision: nn.Module, head: nn.Module, classes: dict[str, int], batch: SceneBatch
) -> dict[str, tuple[Tensor, Tensor]]:
    """{property: (logits (N, C), labels (N,))} over the N patches that belong to a digit."""
    device = next(head.parameters()).device
    # without the CLS token
    features = vision(pixel_values(batch.images).to(device)).last_hidden_state[:, 1:]
    owned = batch.patch_objects >= 0
    logits = head(features[torch.from_numpy(owned).to(device)]).split(list(classes.values()), dim=1)
    slots = np.maximum(batch.patch_objects, 0)
    fields = {
        name: np.take_along_axis(batch.fields[name], slots, axis=1)[owned] for name in classes
    }
    labels = {name: torch.from_numpy(values).to(device) for name, values in fields.items()}
    return {name: (out, labels[name]) for name, out in zip(classes, logits, strict=True)}
