# SPDX-License-Identifier: Apache-2.0
"""The settings of `prereg train`: a wrong one is one line that names it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from prereg_kernels.train.arguments import FSDP_KEYS, RESERVED
from prereg_kernels.train.config import DataConfig, StageConfig, load_config
from tests.docs.pages import ROOT

WHOLE: dict[str, Any] = {
    "model": "a/model",
    "out": "runs/a",
    "data": [{"path": "mix.json", "images": "images", "format": "llava"}, {"path": "org/set"}],
    "pre": {"layers": 16, "weight": 0.5},
    "stages": [
        {"name": "align", "trainable": ["projector"], "learning_rate": 1e-3, "data": [0],
         "pre": None},
        {"name": "tune", "learning_rate": 2e-5, "num_train_epochs": 1, "pre": {"weight": 1}},
        {"name": "more", "max_steps": 7},
    ],
    "lora": None,
    "trainer": {"per_device_train_batch_size": 16, "bf16": True, "max_steps": 5},
    "max_bad": 3,
}  # fmt: skip
LAST_LLM = ("--stages.1.trainable", "[projector]")


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_whole_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", WHOLE))
    assert config.data[0] == DataConfig("mix.json", "llava", "images")
    assert config.data[1] == DataConfig("org/set")
    align, tune, more = config.stages
    assert align == StageConfig("align", ("projector",), (0,), None, {"learning_rate": 1e-3})
    assert tune.trainable == ("projector", "llm")
    assert [config.pre_of(stage) for stage in config.stages] == [
        None, {"layers": 16, "weight": 1}, {"layers": 16, "weight": 0.5},
    ]  # fmt: skip
    assert more.trainer == {"max_steps": 7}
    assert config.data_of(align) == config.data[:1] and config.data_of(tune) == config.data
    assert config.max_bad == 3 and isinstance(config.max_bad, int)


def test_flags_win(tmp_path: Path) -> None:
    flags = [
        "--trainer.max_steps", "9", "--stages.1.learning_rate", "1.0e-4", "--pre.weight", "0.25",
        "--data.0.path", "other.json", "--max_bad", "0.5", "--stages.0.pre", "null",
        "--trainer.report_to", "none", "--model", "b",
    ]  # fmt: skip
    config = load_config(write(tmp_path / "c.yaml", WHOLE), flags)
    assert config.trainer == {**WHOLE["trainer"], "max_steps": 9, "report_to": "none"}
    assert config.stages[1].trainer["learning_rate"] == 1e-4
    assert config.pre == {"layers": 16, "weight": 0.25}
    assert config.data[0].path == "other.json" and config.model == "b" and config.max_bad == 0.5


OWN = {**WHOLE, "stages": WHOLE["stages"][:2]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.learning_rate", "1"],
         "--trainer.learning_rate: expected no stage to have its own, got align, tune; use "
         "--stages.0.learning_rate, --stages.1.learning_rate"),
        (["--pre.weight", "1"], "--pre.weight: .*got align, tune; use --stages.1.pre.weight"),
        (["--pre", "null"], "--pre: expected no stage to have its own, got tune; use --stages"),
        (["--pre", "{layers: 3, weight: 1}"],
         r"--pre\.weight: expected no stage to have its own, got align, tune; use "
         r"--stages\.1\.pre\.weight$"),
        (["--pre.weight", "1", "--stages.1.pre", "null"],
         r"--pre\.weight: expected a stage with PRe, got pre: null in align, tune$"),
        (["--trainer", "{max_steps: 3, learning_rate: 1}"],
         r"--trainer\.learning_rate: .*; use --stages\.0\.learning_rate, --stages\.1\.learn"),
        (["--stages.0.trainer.learning_rate", "1"],
         r"--stages\.0\.trainer\.learning_rate: expected align not to have its own; use "
         r"--stages\.0\.learning_rate$"),
        (["--stages.1.trainer", "{max_steps: 2, num_train_epochs: 3}"],
         r"--stages\.1\.trainer\.num_train_epochs: .*; use --stages\.1\.num_train_epochs$"),
    ],
)  # fmt: skip
def test_a_flag_that_would_change_nothing(tmp_path: Path, flags: list[str], message: str) -> None:
    """Or, as a baseline's, not all: the stages' own settings win."""
    path = write(tmp_path / "c.yaml", OWN)
    with pytest.raises(ValueError, match=message):
        load_config(path, flags)
    baseline = load_config(path, ["--pre", "null", "--stages.1.pre", "null"])
    assert [baseline.pre_of(stage) for stage in baseline.stages] == [None, None]
    config = load_config(path, ["--stages.0.trainer.warmup_steps", "4", "--pre.weight", "2",
                                "--stages.1.pre", "inherit"])  # fmt: skip
    assert config.stages[0].trainer == {"learning_rate": 1e-3, "warmup_steps": 4}
    assert config.pre_of(config.stages[1]) == {"layers": 16, "weight": 2}
    config = load_config(path, ["--trainer.num_train_epochs", "2", "--pre.layers", "3"])
    assert config.trainer["num_train_epochs"] == 2
    assert config.pre_of(config.stages[1]) == {"layers": 3, "weight": 1}


def test_fsdp_s_keys(tmp_path: Path) -> None:
    """Those of the page, of transformers, and with Accelerate's prefix."""
    known = {
        "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "min_num_params": 0,
        "state_dict_type": "SHARDED_STATE_DICT", "transformer_layer_cls_to_wrap": "LlamaLayer",
        "fsdp_reshard_after_forward": True, "cpu_ram_efficient_loading": True,
        "activation_checkpointing": True, "cpu_offload": False, "fsdp_offload_params": False,
    }  # fmt: skip
    path = write(tmp_path / "c.yaml", {**WHOLE, "trainer": {"fsdp_config": known}})
    assert load_config(path).trainer["fsdp_config"] == known
    reads = inspect.getsource(TrainingArguments._process_fsdp_args)
    names = re.findall(r"""self\.fsdp_config(?:\.get\(|\.setdefault\(|\[)"(\w+)\"""", reads)
    names += re.findall(r""""(\w+)" in self\.fsdp_config""", reads)
    assert len(set(names)) >= 12 and set(names) <= FSDP_KEYS


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offload_params", True, "use cpu_offload"),
        ("sharding_strategy", "SHARD_GRAD_OP", "use reshard_after_forward"),
        ("transformer_cls_names_to_wrap", ["X"], "use transformer_layer_cls_to_wrap"),
        ("mixed_precision_policy", "bf16", "use trainer.bf16"),
        ("activation_checkpointing_offload", True, r"expected one of \['activation_ch"),
        ("ignored_modules", "x", r"expected one of \['activation_ch"),
    ],
)
def test_fsdp_s_keys_that_transformers_ignores(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    """Which Accelerate knows: the error has the key that does it."""
    for name in (key, f"fsdp_{key}"):
        trainer = {"fsdp_config": {"fsdp_version": 2, name: value}}
        with pytest.raises(ValueError, match=rf"fsdp_config\.{name}: unknown key; {message}"):
            load_config(write(tmp_path / "c.yaml", {**WHOLE, "trainer": trainer}))


def test_the_baseline_and_defaults(tmp_path: Path) -> None:
    least = {"model": "m", "out": "o", "data": [{"path": "x"}]}
    config = load_config(write(tmp_path / "c.yaml", least))
    assert config.pre == {} and config.pre_of(config.stages[0]) == {}
    config = load_config(tmp_path / "c.yaml", ["--pre", "null"])
    assert config.pre_of(config.stages[0]) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modle", "x"], "modle: unknown key"),
        (["--data.0.pth", "x"], r"data\[0\]\.pth: unknown key"),
        (["--data.0.weight", "0"], r"data\[0\]\.weight: expected a positive number"),
        (["--data", "x"], "data: expected a list"),
        (["--data", "[]"], "data: expected at least one data set"),
        (["--trainer.bf17", "true"], "trainer.bf17: unknown key"),
        (["--trainer.bf16", "7"], "trainer.bf16: expected true or false, got 7"),
        (["--trainer.max_steps", "many"], "trainer.max_steps: expected an integer, got 'many'"),
        (["--trainer.learning_rate", "fast"], "trainer.learning_rate: expected a number, got"),
        (
            ["--trainer.fsdp_config", "{version: 2, auto_wrap_polcy: X}"],
            r"trainer\.fsdp_config\.auto_wrap_polcy: unknown key; expected one of .*'auto_wrap_pol",
        ),
        (
            ["--stages.2.fsdp_config", "{fsdp_versoin: 2}"],
            r"stages\[2\]\.fsdp_config\.fsdp_versoin",
        ),
        (["--trainer.output_dir", "x"], "trainer.output_dir: the command sets it; use out"),
        (["--stages.1.lr", "1"], r"stages\[1\]\.lr: unknown key; expected one of .*Training"),
        (["--stages.1.warmup_steps", "a"], r"stages\[1\]\.warmup_steps: expected"),
        (["--stages.1.trainable", "[head]"], r"stages\[1\]\.trainable: expected some of"),
        (["--stages.1.name", "a/b"], r"stages\[1\]\.name: expected a name of a folder"),
        (["--stages.1.name", "align"], "stages: expected stages of different names"),
        (["--stages.0.data", "[2]"], "stages.data: expected numbers from 0 to 1"),
        (["--stages.1.pre.wait", "1"], r"stages\[1\]\.pre\.wait: not a setting of PRe"),
        (["--stages.1.pre", "yes please"], r"stages\[1\]\.pre: expected settings such as"),
        (["--pre.weight", "-1"], "pre.weight: expected a non-negative"),
        (["--pre.layer", "3"], "pre.layer: not a setting of PRe"),
        (["--lora", "{rr: 4}"], "lora: .*unexpected keyword argument 'rr'"),
        (
            ["--lora", "{r: 4}", "--stages", "[{trainable: [projector]}]"],
            r"lora: expected a stage whose trainable has llm, .*got \[\['projector'\]\]",
        ),
        (
            ["--lora.r", "4", "--quantization.load_in_4bits", "true", *LAST_LLM],
            r"quantization\.load_in_4bits: unknown key; expected one of .*'load_in_4bit', ",
        ),
        (
            ["--lora.r", "4", "--quantization.bnb_4bit_quant_type", "nf4", *LAST_LLM],
            "quantization: expected load_in_4bit: true or load_in_8bit: true, got {'bnb_4bit_qu",
        ),
        (
            ["--lora.r", "4", "--quantization.load_in_4bit", "1", *LAST_LLM],
            "quantization: load_in_4bit must be a boolean",
        ),
        (["--max_bad", "1.5"], "max_bad: expected a share below 1, or a count"),
        (["--max_bad", "-1"], "max_bad: expected a share below 1, or a count"),
        (["--max_length", "0"], "max_length: expected at least 1"),
        (["--stages.9.name", "x"], r"--stages\.9\.name: expected a number from 0 to 2, got 9"),
        (["--model.x", "1"], r"--model\.x: there is no x in 'a/model'"),
        (["--model"], "--model: expected a value after it"),
        (["model", "x"], "model: expected a flag such as --section.field VALUE"),
        (["--model", "[x"], "--model: .*expected"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(tmp_path / "c.yaml", WHOLE), flags)
    assert "\n" not in str(caught.value)


def test_the_page_s_seven_fields() -> None:
    """Those that docs/training.md says are refused."""
    page = (ROOT / "docs" / "training.md").read_text()
    [said] = re.findall(r"Seven fields are refused:([^.]+)\.", page)
    assert set(re.findall(r"`(\w+)`", said)) == set(RESERVED) and len(RESERVED) == 7


@pytest.mark.parametrize("values", [None, [], 3])
def test_a_file_of_something_else(tmp_path: Path, values: Any) -> None:
    with pytest.raises(ValueError, match=r"c\.yaml: "):
        load_config(write(tmp_path / "c.yaml", values))


def test_a_base(tmp_path: Path) -> None:
    """A file is over its base: key by key, and so in lists of as many mappings."""
    write(tmp_path / "base.yaml", WHOLE)
    own = {"base": "base.yaml", "out": "b", "pre": {"layers": 14}, "trainer": {"bf16": False},
           "stages": [{}, {"trainable": ["llm"], "pre": None}, {"name": "last"}]}  # fmt: skip
    config = load_config(write(tmp_path / "own.yaml", own), ["--trainer.max_steps", "1"])
    assert config.pre == {"layers": 14, "weight": 0.5} and config.out == "b"
    assert config.trainer == {**WHOLE["trainer"], "bf16": False, "max_steps": 1}
    assert config.model == WHOLE["model"] and config.data[1] == DataConfig("org/set")
    align, tune, last = config.stages
    assert align == load_config(tmp_path / "base.yaml").stages[0]
    assert tune == StageConfig(
        "tune", ("llm",), None, None, {"learning_rate": 2e-5, "num_train_epochs": 1}
    )
    assert (last.name, last.trainer) == ("last", {"max_steps": 7})
    write(tmp_path / "further.yaml", {"base": "own.yaml", "pre": None, "stages": [{"name": "a"}]})
    config = load_config(tmp_path / "further.yaml")
    assert config.pre is None and [stage.name for stage in config.stages] == ["a"]


def test_a_list_is_over_the_base_s(tmp_path: Path) -> None:
    """A data set has no setting of another that stood in its place."""
    write(tmp_path / "base.yaml", WHOLE)
    own = {"base": "base.yaml", "data": [{"path": "mine.json"}, {"path": "more.json"}]}
    config = load_config(write(tmp_path / "own.yaml", own))
    assert config.data == (DataConfig("mine.json"), DataConfig("more.json"))
    assert [stage.name for stage in config.stages] == ["align", "tune", "more"]


def test_a_stage_s_pre_is_over_the_recipe_s(tmp_path: Path) -> None:
    """Key by key, as a stage's fields are over the trainer's."""
    anchor = {"anchor": "pre_projector", "weight": 0.5}
    config = load_config(write(tmp_path / "c.yaml", {**WHOLE, "pre": anchor}))
    align, tune, more = map(config.pre_of, config.stages)
    assert (align, tune, more) == (None, {**anchor, "weight": 1}, anchor)
    config = load_config(write(tmp_path / "c.yaml", {**WHOLE, "pre": None}))
    assert [config.pre_of(stage) for stage in config.stages] == [None, {"weight": 1}, None]


@pytest.mark.parametrize("base", [3, ["a.yaml"], "c.yaml", "d.yaml", None])
def test_a_base_that_is_none(tmp_path: Path, base: Any) -> None:
    """Or in a circle."""
    write(tmp_path / "c.yaml", {**WHOLE, "base": base})
    write(tmp_path / "d.yaml", {"base": "c.yaml"})
    with pytest.raises(ValueError, match=r"[cd]\.yaml: base: expected another file, got"):
        load_config(tmp_path / "c.yaml")
