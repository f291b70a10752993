# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from prereg_kernels._util.files import write_whole
from prereg_kernels._util.settings import check_numbers, require, require_count
from prereg_kernels._util.settings_file import to_dict
from prereg_kernels.demo.data.questions import COMMON_FAMILIES, check_families
from prereg_kernels.demo.data.scenes import SceneConfig
from prereg_kernels.demo.model.llava import MODULES, ModelConfig

PRECISIONS = ("fp32", "bf16")
CONTROLS = {"pre_llm": "other_scene", "pre_projector": "other_scene_pre_projector"}
"""Each anchor, and the control that has its statistics and another scene's content."""
TRAINED = {"projector": "tower and projector frozen", "nothing": "the projector trained too"}
"""How learning new questions afterwards is called, by what is frozen beside the tower."""
ANCHORS = (*CONTROLS, *CONTROLS.values())
DATA = ("scenes", "text")


@dataclass(frozen=True)
class TowerConfig:
    """How the vision tower learns to see: supervised, each patch naming its digit's properties.

    Attributes:
        steps: optimizer steps.
        batch: scenes a step.
        lr: AdamW's peak learning rate; then a cosine.
        warmup: steps up to that peak.
        weight_decay: AdamW's.
        min_digits: fewest digits of its scenes, denser than the questions' (more labels an image).
        max_digits: most digits of its scenes.
        digit_weight: weight of the digit's cross-entropy against each attribute's.
        seed: of the initial weights and the data. Runs with different seeds share one tower.
    """

    steps: int = 1000
    batch: int = 32
    lr: float = 6e-3
    warmup: int = 40
    weight_decay: float = 0.05
    min_digits: int = 9
    max_digits: int = 9
    digit_weight: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self)
        require("steps", self.steps >= 1, "at least 1", self.steps)
        require_count("batch", self.batch)
        require("lr", self.lr > 0, "a positive number", self.lr)
        require("warmup", self.warmup >= 0, "at least 0", self.warmup)
        require("weight_decay", self.weight_decay >= 0, "at least 0", self.weight_decay)
        low, high = self.min_digits, self.max_digits
        require("min_digits", low >= 1, "at least 1", low)
        require("max_digits", low <= high, "at least min_digits", high)
        require("digit_weight", self.digit_weight > 0, "a positive number", self.digit_weight)
        require("seed", self.seed >= 0, "at least 0", self.seed)


@dataclass(frozen=True)
class PReSettings:
    """Predictive Regularization in a run.

    Attributes:
        weight: of L_PRe beside L_LM.
        layer: decoder layer whose output predicts, counted from 1.
        anchor: "pre_llm", the image's own features as they enter the LLM; "pre_projector", the
            tower's output; or the controls of either, with the right statistics and the wrong
            content: "other_scene" and "other_scene_pre_projector", those of another image.
        token_fraction: part of the visual tokens that each step draws, in (0, 1].
    """

    weight: float = 2.0
    layer: int = 3
    anchor: str = "pre_llm"
    token_fraction: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        require("weight", self.weight > 0, "a positive number", self.weight)
        require("layer", self.layer >= 1, "at least 1", self.layer)
        require("anchor", self.anchor in ANCHORS, f"one of {ANCHORS}", self.anchor)
        fraction = self.token_fraction
        require("token_fraction", 0 < fraction <= 1, "a number in (0, 1]", fraction)


@dataclass(frozen=True)
class StageConfig:
    """One stage of training; each has its own optimizer and schedule.

    Attributes:
        name: for the logs.
        steps: optimizer steps.
        lr: peak learning rate, reached after `warmup` steps, then a cosine down to 0.
        warmup: steps up to that peak.
        trainable: parts that train, of "tower", "projector", "llm".
        frozen_layers: so many of the first decoder layers, and the embeddings, stay frozen.
        pre: whether PRe is on (its settings are the run's).
        data: "scenes", or "text": questions about a description of the scene in words, without an
            image; of other scenes, so that the other stages see what they would see without it.
    """

    name: str
    steps: int
    lr: float = 2e-3
    warmup: int = 20
    trainable: tuple[str, ...] = ("projector", "llm")
    frozen_layers: int = 0
    pre: bool = False
    data: str = "scenes"

    def __post_init__(self) -> None:
        check_numbers(self)
        require("steps", self.steps >= 1, "at least 1", self.steps)
        require("lr", self.lr > 0, "a positive number", self.lr)
        require("warmup", self.warmup >= 0, "at least 0", self.warmup)
        require("data", self.data in DATA, f"one of {DATA}", self.data)
        text = self.data == "text"
        require("pre", not (text and self.pre), "false where data is text: no visual token", True)
        known = bool(self.trainable) and set(self.trainable) <= set(MODULES)
        require("trainable", known, f"some of {MODULES}", self.trainable)
        alone = self.trainable == ("llm",)
        require("trainable", alone or not text, "[llm] where data is text", self.trainable)
        require("frozen_layers", self.frozen_layers >= 0, "at least 0", self.frozen_layers)


def _two_stages() -> tuple[StageConfig, ...]:
    return (
        StageConfig("projector", steps=20, lr=2e-3, warmup=5, trainable=("projector",)),
        StageConfig("projector and llm", steps=380, lr=2e-3, warmup=20, pre=True),
    )


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    Attributes:
        seed: of the decoder's initial weights and of the data; runs to be paired share it.
        scenes: what is seen.
        model: what sees it.
        tower: how it learned to see.
        stages: in order; by default LLaVA's two, with PRe in the second.
        pre: PRe's settings, for the stages that switch it on.
        families: {question family: weight} of the training questions.
        questions_per_scene: labels in each sequence.
        distinct_scenes: train on so many scenes, over and over; None: never the same one twice.
        micro_batch: scenes in a micro-batch.
        accumulation: micro-batches in a step.
        precision: "fp32", or "bf16" (autocast; weights and optimizer stay fp32).
        weight_decay: AdamW's.
        beta1: AdamW's.
        beta2: AdamW's.
        grad_clip: the largest gradient norm.
        checkpoint_every: steps between checkpoints; there is always one at the end.
        checkup_every: steps between checkups during training (answers and probes, as after it);
            None: none. They draw no random number and change no weight.
        checkup_scenes: test scenes that such a checkup asks about, and train and test scenes that
            its probes are fitted and tested on.
        init_from: a checkpoint directory to start from instead of a trained tower and a random
            decoder.
    """

    seed: int = 0
    scenes: SceneConfig = field(default_factory=SceneConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    stages: tuple[StageConfig, ...] = field(default_factory=_two_stages)
    pre: PReSettings = field(default_factory=PReSettings)
    families: Mapping[str, float] = field(
        default_factory=lambda: dict.fromkeys(COMMON_FAMILIES, 1.0)
    )
    questions_per_scene: int = 16
    distinct_scenes: int | None = None
    micro_batch: int = 12
    accumulation: int = 1
    precision: str = "fp32"
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    grad_clip: float = 1.0
    checkpoint_every: int = 100
    checkup_every: int | None = None
    checkup_scenes: int = 128
    init_from: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        require("seed", self.seed >= 0, "at least 0", self.seed)
        require("stages", len(self.stages) >= 1, "at least one stage", self.stages)
        for stage in self.stages:
            depth = self.model.decoder_layers
            require(
                "frozen_layers", stage.frozen_layers <= depth, f"<= {depth}", stage.frozen_layers
            )
            ok = not stage.pre or self.pre.layer <= depth
            require("pre.layer", ok, f"at most {depth}, the decoder's depth", self.pre.layer)
        check_families(self.families)
        for name in ("questions_per_scene", "micro_batch", "accumulation", "checkup_scenes"):
            require_count(name, getattr(self, name))
        require("checkpoint_every", self.checkpoint_every >= 1, "at least 1", self.checkpoint_every)
        every = self.checkup_every
        require("checkup_every", every is None or every >= 1, "None or >= 1", every)
        require("checkup_scenes", self.checkup_scenes >= 8, "at least 8", self.checkup_scenes)
        distinct = self.distinct_scenes
        require("distinct_scenes", distinct is None or distinct >= 1, "None or >= 1", distinct)
        anchor = self.pre.anchor
        other = any(stage.pre for stage in self.stages) and anchor in CONTROLS.values()
        require("micro_batch", not other or self.micro_batch > 1, f"at least 2 for {anchor}", 1)
        require("precision", self.precision in PRECISIONS, f"one of {PRECISIONS}", self.precision)
        require("weight_decay", self.weight_decay >= 0, "at least 0", self.weight_decay)
        require("beta1", 0 <= self.beta1 < 1, "in [0, 1)", self.beta1)
        require("beta2", 0 <= self.beta2 < 1, "in [0, 1)", self.beta2)
        require("grad_clip", self.grad_clip > 0, "a positive number", self.grad_clip)

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write a YAML file that `load_config` reads back equal."""
    write_whole(Path(path), yaml.safe_dump(to_dict(config), sort_keys=False))
