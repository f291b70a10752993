# SPDX-License-Identifier: Apache-2.0
"""The settings of `prereg train`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prereg_kernels._util.files import printable
from prereg_kernels._util.settings import check_numbers, require, require_count, shown
from prereg_kernels._util.settings_file import from_dict, override, read_yaml, take_flags
from prereg_kernels.train.arguments import (
    argument_types,
    check_arguments,
    check_lora,
    check_quantization,
)
from prereg_kernels.train.parts import PARTS
from prereg_kernels.trainers.attachment import read_settings

NON_FINITE = ("stop", "skip")
"""What happens at a loss or gradient that is NaN or infinite."""
INHERIT = "inherit"
"""A stage's `pre`: that of the run."""


@dataclass(frozen=True)
class DataConfig:
    """A set of conversations.

    Attributes:
        path: a file, a folder, or, where there is neither, a data set's name on the hub.
        format: how it is written: the name of a module of `prereg_kernels.train.sources`.
        images: the folder that image paths start from; None: the file's own. Nothing outside of it
            is read.
        split: of a data set of several.
        weight: how often an epoch has its samples: 2.0, twice each; 0.5, a half, drawn anew for
            each epoch. Of streams: their shares of the samples.
        streaming: read it as it comes, without an index; see `prereg_kernels.train.streaming`.
    """

    path: str
    format: str = "messages"
    images: str | None = None
    split: str = "train"
    weight: float = 1.0
    streaming: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        require("weight", self.weight > 0, "a positive number", self.weight)


@dataclass(frozen=True)
class StageConfig:
    """A stage of training, which has its own optimizer and schedule.

    Attributes:
        name: of its folder, and in the logs.
        trainable: of "tower", "projector", "llm". With LoRA, the adapter trains in place of the
            LLM.
        data: numbers of the run's data sets; None: all.
        pre: PRe's settings, over those of the run; None for none, or "inherit": those of the run.
        trainer: fields of transformers' TrainingArguments, over those of the run. In a file they
            stand in the stage itself.
    """

    name: str = "train"
    trainable: tuple[str, ...] = ("projector", "llm")
    data: tuple[int, ...] | None = None
    pre: Mapping[str, Any] | str | None = INHERIT
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = bool(self.name) and not set(self.name) & set('/\\"') and self.name[0] != "."
        require("name", plain, "a name of a folder", self.name)
        known = bool(self.trainable) and set(self.trainable) <= set(PARTS)
        require("trainable", known, f"some of {PARTS}", self.trainable)


@dataclass(frozen=True)
class CheckupConfig:
    """A checkup of held-out images while the run trains.

    Attributes:
        steps: between two of them; there is one before the first step, and one after the last.
        data: their conversations, each of one image; what is answered to a question is the image's
            class in a linear probe. None: `images` alone, where a folder is a class.
        format: of `data`, as in `DataConfig`.
        images: their folder.
        masks: a folder with a PNG file of object numbers (0 and 255: background) for each image, at
            the image's path. Without them there are no cohesion and coupling.
        limit: images.
    """

    steps: int = 500
    data: str | None = None
    format: str = "llava"
    images: str | None = None
    masks: str | None = None
    limit: int = 64

    def __post_init__(self) -> None:
        require_count("steps", self.steps, 2**40)
        require_count("limit", self.limit, 2**20)
        require("data", bool(self.data or self.images), "a file, or images", self.data)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: a directory, or a model's name on the hub.
        out: the folder that everything goes to.
        data: what it trains on.
        pre: PRe's settings, as `PReConfig` has them; None: none, which is the baseline.
        stages: one after the other.
        lora: PEFT's LoraConfig; None: no adapter.
        quantization: transformers' BitsAndBytesConfig, for QLoRA: of the LLM, in the last stage,
            which alone may train it. None: none.
        model_arguments: of `from_pretrained`, such as `attn_implementation` and `dtype`.
        trainer: fields of transformers' TrainingArguments.
        max_length: tokens of a sample, images included. A longer answer is cut.
        packing_length: tokens of a row, which holds as many whole samples as fit; None: a row has
            one. `per_device_train_batch_size` then counts rows.
        max_bad: samples that cannot be used before the run ends: a share of those seen, at least
            one, or, as an integer, a count.
        non_finite: "stop", which names the batch of a loss or gradient that is NaN or infinite, or
            "skip", which names it and goes on without its step.
        checkup: of held-out images while the run trains; None: none.
    """

    model: str
    out: str
    data: tuple[DataConfig, ...]
    pre: Mapping[str, Any] | None = field(default_factory=dict)
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    lora: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 2048
    packing_length: int | None = None
    max_bad: int | float = 0.001
    non_finite: str = "stop"
    checkup: CheckupConfig | None = None

    def __post_init__(self) -> None:
        require_count("max_length", self.max_length, 2**20)
        if self.packing_length is not None:
            require_count("packing_length", self.packing_length, 2**20)
            require(
                "packing_length", self.packing_length >= self.max_length,
                f"at least max_length, {self.max_length}", self.packing_length,
            )  # fmt: skip
        require("data", len(self.data) >= 1, "at least one data set", self.data)
        require("stages", len(self.stages) >= 1, "at least one stage", self.stages)
        names = [stage.name for stage in self.stages]
        require("stages", len(set(names)) == len(names), "stages of different names", names)
        require("out", bool(self.out), "a folder", self.out)
        bad = self.max_bad
        is_count = isinstance(bad, int) and not isinstance(bad, bool)
        is_share = isinstance(bad, float) and 0 <= bad < 1
        require("max_bad", (is_count and bad >= 0) or is_share, "a share below 1, or a count", bad)
        require(
            "non_finite", self.non_finite in NON_FINITE, f"one of {NON_FINITE}", self.non_finite
        )
        if self.lora is not None:
            require(
                "lora", any("llm" in stage.trainable for stage in self.stages),
                "a stage whose trainable has llm, which the adapter trains in place of",
                [list(stage.trainable) for stage in self.stages],
            )  # fmt: skip
        if self.quantization is not None:
            require("lora", self.lora is not None, "settings, beside quantization", self.lora)
            require(
                "stages", not any("llm" in stage.trainable for stage in self.stages[:-1]),
                "the LLM to train in the last stage alone, beside quantization", names,
            )  # fmt: skip
        for stage in self.stages:
            for number in stage.data or ():
                last = len(self.data) - 1
                require("stages.data", 0 <= number <= last, f"numbers from 0 to {last}", number)
            streaming = {data.streaming for data in self.data_of(stage)}
            require(
                "data.streaming", len(streaming) == 1,
                f"the same for all data of stage {stage.name}", sorted(streaming),
            )  # fmt: skip
            steps = {**self.trainer, **stage.trainer}.get("max_steps", -1)
            require(
                "max_steps", not self.is_streaming(stage) or (isinstance(steps, int) and steps > 0),
                f"a number of steps for stage {stage.name}, as a stream has no length", steps,
            )  # fmt: skip

    def data_of(self, stage: StageConfig) -> tuple[DataConfig, ...]:
        """The data sets of a stage."""
        return self.data if stage.data is None else tuple(self.data[i] for i in stage.data)

    def is_streaming(self, stage: StageConfig) -> bool:
        """Whether its data are streams: all of them are, or none."""
        return self.data_of(stage)[0].streaming

    def pre_of(self, stage: StageConfig) -> Mapping[str, Any] | None:
        """PRe's settings in a stage; None: none."""
        if stage.pre is None or isinstance(stage.pre, str):
            return None if stage.pre is None else self.pre
        return {**(self.pre or {}), **stage.pre}


def load_config(path: str | Path, flags: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, with flags such as `--trainer.max_steps 10` over what it says.

    Its `base`, where it has one, is the path of another from its own folder: what the file says is
    over what that one says, key by key, and in as many stages stage by stage.

    Raises:
        ValueError: not YAML, an unknown key, a wrong type or a value out of range, named by its
            path; the message names the file.
        OSError: the file cannot be read.
    """
    values = override(_read(Path(path), ()), flags)
    try:
        config = _from_values(values)
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}") from None
    for flag, value in take_flags(flags)[1].items():
        is_section = flag.split(".")[-1] in ("trainer", "pre") and isinstance(value, Mapping)
        for name, part in value.items() if is_section else [("", value)]:
            _check_effect(config, values.get("stages", []), f"{flag}.{name}".rstrip("."), part)
    return config


def _check_effect(config: TrainConfig, written: Sequence[Any], path: str, value: Any) -> None:
    """Raise ValueError where a flag would change nothing, as stages have settings of their own.

    A baseline's `--pre null` has to hold for all of them.

    Args:
        written: the stages as file and flags have them.
    """
    if found := re.fullmatch(r"stages\.(\d+)\.trainer\.(\w+)", path):
        i, name = int(found[1]), found[2]
        if name in written[i]:
            raise ValueError(
                f"--{path}: expected {config.stages[i].name} not to have its own; use "
                f"--stages.{i}.{name}"
            )
    own = [i for i, stage in enumerate(config.stages) if _has_own(stage, path, value)]
    if not (len(own) == len(config.stages) or (own and path == "pre")):
        return
    names = ", ".join(config.stages[i].name for i in own)
    # Not where a stage has none, which such a flag would turn on
    usable = [i for i in own if path.startswith("trainer") or config.stages[i].pre is not None]
    if not usable:
        raise ValueError(f"--{path}: expected a stage with PRe, got pre: null in {names}")
    flags = ", ".join(f"--stages.{i}.{path.removeprefix('trainer.')}" for i in usable)
    raise ValueError(f"--{path}: expected no stage to have its own, got {names}; use {flags}")


def _has_own(stage: StageConfig, path: str, value: Any) -> bool:
    """Whether what a flag sets for all stages does not hold in this one."""
    section, _, rest = path.partition(".")
    name = rest.partition(".")[0]
    if section == "trainer":
        return name in stage.trainer
    if section != "pre" or isinstance(stage.pre, str):
        return False
    if stage.pre is None:
        return bool(name)
    return name in stage.pre if name else value is None


def _read(path: Path, readers: tuple[Path, ...]) -> Any:
    """A file over its base. `readers` are those whose base it is."""
    values = read_yaml(path) or {}
    if not (isinstance(values, Mapping) and "base" in values):
        return values
    base, own = values["base"], {name: x for name, x in values.items() if name != "base"}
    chain = (*readers, path.resolve())
    if not isinstance(base, str) or (path.parent / base).resolve() in chain:
        raise ValueError(f"{printable(path)}: base: expected another file, got {shown(base)}")
    below = _read(path.parent / base, chain)
    merged = _over(below, own)
    stages = below.get("stages") if isinstance(below, Mapping) else None
    mine = own.get("stages")
    if isinstance(stages, list) and isinstance(mine, list) and len(stages) == len(mine):
        merged["stages"] = [_over(*pair) for pair in zip(stages, mine, strict=True)]
    return merged


def _over(base: Any, own: Any) -> Any:
    """Mappings key by key; else `own`."""
    if isinstance(base, Mapping) and isinstance(own, Mapping):
        return {**base, **{name: _over(base.get(name), x) for name, x in own.items()}}
    return own


def _from_values(values: Any) -> TrainConfig:
    if not isinstance(values, Mapping):
        raise ValueError(f"config: expected a mapping, got {shown(values)}")
    values = dict(values)
    stages = values.get("stages")
    if isinstance(stages, Sequence) and not isinstance(stages, str):
        values["stages"] = [
            _with_arguments(stage, f"stages[{i}]") if isinstance(stage, Mapping) else stage
            for i, stage in enumerate(stages)
        ]
    config = from_dict(TrainConfig, values)
    check_arguments(config.trainer, "trainer")
    if config.lora is not None:
        check_lora(config.lora)
    if config.quantization is not None:
        check_quantization(config.quantization)
    for i, stage in enumerate(config.stages):
        check_arguments(stage.trainer, f"stages[{i}]")
        if stage.pre != INHERIT:
            read_settings(stage.pre, f"stages[{i}].pre")
            read_settings(config.pre_of(stage), f"stages[{i}].pre")
    read_settings(config.pre, "pre")
    return config


def _with_arguments(stage: Mapping[str, Any], at: str) -> dict[str, Any]:
    """A stage whose fields of TrainingArguments are in "trainer"."""
    own = {item.name for item in dataclasses.fields(StageConfig)}
    arguments = {name: value for name, value in stage.items() if name not in own}
    for name in arguments:
        if name not in argument_types():
            raise ValueError(
                f"{at}.{name}: unknown key; expected one of {sorted(own)} or a field of "
                "transformers' TrainingArguments"
            )
    given = {name: value for name, value in stage.items() if name in own}
    return {**given, "trainer": {**given.get("trainer", {}), **arguments}}
