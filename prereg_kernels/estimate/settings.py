# SPDX-License-Identifier: Apache-2.0
"""What an estimate is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from prereg_kernels._util.files import printable
from prereg_kernels.attach.config import ANCHORS
from prereg_kernels.estimate.structure import PARTS

PARALLEL = ("ddp", "fsdp", "zero2", "zero3", "tp")
DTYPES = {"bfloat16": 2, "float32": 4}
OPTIMIZERS = {"adamw": 2, "sgd": 0}
"""{an optimizer: how many numbers it keeps for each that trains}."""
COUNTS = ("images_per_step", "tokens", "visual_tokens", "gpus", "pre_layer", "head_features")
MOST = 2**40


@dataclass(frozen=True)
class Settings:
    """A step, and the machines that take it. Names are those of the flags.

    Attributes:
        images_per_step: of all GPUs together, one a sample; None: 16 a GPU.
        tokens: of text, of a sample.
        visual_tokens: of an image; None: of the usual size of the model's images.
        gpus: how many.
        gpu: of which kind, or "cpu".
        parallel: how the GPUs share the work. "tp" splits each layer over the GPUs of a machine,
            and samples over machines.
        checkpointing: whether the decoder's layers are computed again in backward.
        train: the parts that train.
        weights: dtype of the weights. GPUs multiply bfloat16 copies of float32 ones, as autocast
            makes them. A CPU multiplies weights as they are.
        optimizer: "adamw", or "sgd" without momentum.
        pre_layer: counted from 1; None: the middle one.
        anchor: what the head predicts, by the names of `apply_pre`.
        head_features: M; None: D.
        depth: matrices of the head.
        head_dtype: dtype of its weights.
        token_fraction: of the visual tokens that PRe looks at.
    """

    images_per_step: int | None = None
    tokens: int = 192
    visual_tokens: int | None = None
    gpus: int = 1
    gpu: str = "h100"
    parallel: str = "ddp"
    checkpointing: bool = False
    train: tuple[str, ...] = ("projector", "llm")
    weights: str = "bfloat16"
    optimizer: str = "adamw"
    pre_layer: int | None = None
    anchor: str = "pre_llm"
    head_features: int | None = None
    depth: int = 2
    head_dtype: str = "float32"
    token_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                raise _wrong(name, "an integer of at least 1", value)
        if self.anchor not in ANCHORS:
            raise _wrong("anchor", f"one of {', '.join(ANCHORS)}", self.anchor)
        if not 0 <= self.depth <= 64:
            raise _wrong("depth", "an integer from 0 to 64", self.depth)
        if not 0 < self.token_fraction <= 1:
            raise _wrong("token_fraction", "a number in (0, 1]", self.token_fraction)
        if not self.train or not set(self.train) <= set(PARTS):
            raise _wrong("train", f"some of {', '.join(PARTS)}", ",".join(self.train))
        if self.images < self.gpus // self.split:
            raise _wrong("images_per_step", "an image for each GPU at least", self.images)
        if self.gpus % self.split:
            raise _wrong("gpus", "a multiple of 8, or fewer, with --parallel tp", self.gpus)
        if self.gpu == "cpu" and self.gpus > 1:
            raise _wrong("gpus", "1 with --gpu cpu", self.gpus)

    @property
    def images(self) -> int:
        """Of a step."""
        return 16 * self.gpus if self.images_per_step is None else self.images_per_step

    @property
    def split(self) -> int:
        """GPUs that share a sample."""
        return min(self.gpus, 8) if self.parallel == "tp" else 1

    @property
    def replicas(self) -> int:
        """Groups of GPUs that have other samples."""
        return self.gpus // self.split

    @property
    def samples(self) -> int:
        """Of the GPU that has most."""
        return -(-self.images // self.replicas)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"images": self.images}

    @property
    def products(self) -> str:
        """The dtype of what is multiplied."""
        return self.weights if self.gpu == "cpu" else "bfloat16"

    @property
    def holder(self) -> str:
        """Whose memory it is, in words."""
        return "the process" if self.gpu == "cpu" else "a GPU"


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    flag = name.replace("_", "-")
    return ValueError(f"--{flag}: expected {expected}, got {printable(value)}")
