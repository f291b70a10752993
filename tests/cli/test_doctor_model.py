# SPDX-License-Identifier: Apache-2.0
"""prereg doctor MODEL: what it says of right models, of refused ones, and of no model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoConfig,
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
)

from prereg_kernels.attach import families, regularizer, resolver
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.resolver import Resolution, resolve
from prereg_kernels.cli import made_up
from prereg_kernels.cli.commands import main
from prereg_kernels.cli.doctor_model import examine_model
from prereg_kernels.train.parts import linear_of_llm, parts_of
from tests.checkup.pictures import save_tokenizer
from tests.cli.test_reduced import default
from tests.releases import HERE, is_here, needs
from tests.tiny import IMAGE_TOKEN, LAYERS, PATCHES, WIDTH, make_batch, tiny_llava
from tests.zoo import CASES, sample
from tests.zoo.refused import REFUSED

POSITIONS = PATCHES + 5  # of the image, and of the words of the question
# Their decoders change each row of the table, so that nothing is to be compared.
UNSEEN = {"kosmos-2", "kosmos-2.5"}
LLAMA = {"model_type": "llama"}
DEEP = {"qwen3_vl": 2}
"""{a type whose encoder feeds the decoder's layers: by so many mergers in the zoo}"""
NEED_TIMM = {"fast_vlm", "gemma3n", "perception_lm"}  # the zoo has stubs in place of its towers


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A LLaVA's config, and nothing else."""
    directory = tmp_path / "llava"
    tiny_llava().config.save_pretrained(directory)
    return directory


@pytest.fixture
def whole(bare: Path) -> Path:
    """And its processor."""
    save_tokenizer(bare, "{% for m in messages %}<image> hello bye look hello bye{% endfor %}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bare)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])  # found without spaces around it
    size = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    LlavaProcessor(
        image_processor, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    ).save_pretrained(bare)  # fmt: skip
    return bare


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Done(NamedTuple):
    """How a command ended."""

    returncode: int | str | None
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`prereg doctor DIRECTORY ...` in this process, as its imports take seconds."""

    def run_here(directory: Path, *flags: str) -> Done:
        with (
            mock.patch.object(sys, "argv", ["prereg", "doctor", str(directory), *flags]),
            pytest.raises(SystemExit) as stop,
        ):
            capsys.readouterr()
            main()
        return Done(stop.value.code, *capsys.readouterr())

    return run_here


def test_a_listed_family(whole: Path, run: Run) -> None:
    done = run(whole)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
    report, works = examine_model(whole)
    assert works and list(report) == ["model", "batch"]
    said = [line.split()[0] for line in done.stdout.splitlines()]
    assert said == ["model", *(k.split()[0] for k in report["model"]), "batch", "model", "batch"]
    assert lines["class"] == "LlavaForConditionalGeneration"
    assert report["model"] == {
        "class": "LlavaForConditionalGeneration",
        "model_type": "llava",
        "supported": "yes",
        "family": "LLaVA, listed",
        "language_model": "model.language_model: it holds the layers and takes inputs_embeds",
        "layers": f"model.language_model.layers: {LAYERS} LlamaDecoderLayer, by get_decoder()",
        "visual_tokens": f"image_token_id = {IMAGE_TOKEN}",
        "other_tokens": "none",
        "layer": f"2, the middle of {LAYERS}",
        "width": f"{WIDTH}",
        "head": f"{2 * WIDTH * (WIDTH + 1):,} parameters, with the anchor pre_llm",
        "level global": "possible, by an equal number of tokens for each image",
        "pre_projector": "possible, at model.multi_modal_projector",
        "projector": "model.multi_modal_projector: beside LoRA it trains by modules_to_save",
    }
    assert report["batch"]["batch"] == (
        f"checked: {PATCHES} visual tokens of {POSITIONS} positions, features where PRe expects "
        "them"
    )


def test_json_says_the_same(whole: Path, run: Run) -> None:
    assert json.loads(run(whole, "--json").stdout) == examine_model(whole)[0]


def test_a_processor_that_needs_torchvision(bare: Path) -> None:
    """That of Qwen2.5-VL has one for videos, and the tests' environment is without torchvision."""
    save_tokenizer(bare, "{% for m in messages %}<image> hello{% endfor %}")
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}
    settings |= {"processor_class": "Qwen2_5_VLProcessor"}
    (bare / "preprocessor_config.json").write_text(json.dumps(settings))
    (bare / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with pytest.raises(made_up.NotRunError, match=r"needs torchvision .*; .*install.* torch.*2\."):
        made_up._processor(bare, Qwen2_5_VLConfig())


def test_without_a_processor(bare: Path) -> None:
    report, works = examine_model(bare)
    assert works and report["model"]["supported"] == "yes"
    assert report["batch"] == {"batch": "not run, since llava has no processor"}


def test_a_family_that_is_not_listed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", ())
    monkeypatch.setattr(resolver, "FAMILIES", ())
    report, works = examine_model(whole)
    assert works and report["model"]["family"] == "llava, found"
    assert report["model"]["level global"].startswith("not possible: level: 'global' is the mean")
    assert report["model"]["pre_projector"].endswith("expected 'pre_llm' or a function")
    assert report["batch"]["batch"].startswith(f"checked: {PATCHES} visual tokens")


def test_a_refused_family(tmp_path: Path, run: Run) -> None:
    sample("mllama").model.config.save_pretrained(tmp_path / "mllama")
    done = run(tmp_path / "mllama")
    assert (done.returncode, done.stderr) == (1, "")
    line = next(line for line in done.stdout.splitlines() if "supported" in line)
    assert "no: model: MllamaForConditionalGeneration is not supported: its decoder reads" in line
    assert "Traceback" not in done.stdout


def test_a_model_of_text_alone(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=2, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    report, works = examine_model(tmp_path)
    assert not works and "no id of a visual token" in report["model"]["supported"]


def test_features_elsewhere_are_an_error(whole: Path, run: Run) -> None:
    """Of an id that the model does not replace."""
    change(whole / "config.json", video_token_id=3)
    report, works = examine_model(whole)
    assert not works and report["batch"]["batch"].startswith("error: visual_tokens: of the ")
    assert run(whole).returncode == 1


def test_features_of_other_tokens_are_a_warning(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows of text that the model changes."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        embeddings = kwargs["inputs_embeds"].clone()
        embeddings[:, -1] += 1
        return args, kwargs | {"inputs_embeds": embeddings}

    small = made_up._small

    def changed(kind: Any, config: Any) -> Any:
        model, words = small(kind, config)
        model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
        return model, words

    monkeypatch.setattr(made_up, "_small", changed)
    report, works = examine_model(whole)
    assert works
    assert report["batch"]["batch"].startswith(
        f"{PATCHES} visual tokens of {POSITIONS} positions; warning: PRe: 1 positions of the batch"
    )


@needs("granite4_vision")
def test_a_check_in_part_is_told() -> None:
    """Where layers run before the features are there, rows of text are of no table."""
    case = sample("granite4_vision")
    config, batch = case.model.config, case.batches["images"]
    config.deepstack_layer_map, config.spatial_target_layers = [(-1, 1), (-2, 2)], [1, 2, 3, 3]
    said, works = made_up._checked(case.model.eval(), batch.inputs)
    seen = f"{int(batch.visual.sum())} visual tokens of {batch.visual.numel()} positions"
    assert works and said == (
        f"checked in part: {seen} have features where they enter layer 2, "
        "and layers before it change all rows, so the others are not compared"
    )


def test_layers_that_are_not_the_decoder_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava().eval()
    [encoder] = (n for n, _ in model.named_modules() if n.endswith("encoder"))
    family = Family(
        "mine", layers=f"{encoder}.layers", language_model=encoder,
        visual_tokens=("image_token_id",),
    )  # fmt: skip
    monkeypatch.setattr(regularizer, "resolve", lambda *_: Resolution(family, "listed", {}))
    monkeypatch.setattr(made_up, "resolve", lambda *_: Resolution(family, "listed", {}))
    said, works = made_up._checked(model, make_batch())
    assert not works and said.startswith("error: ")


def _remote(directory: Path) -> None:
    names = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
    change(directory / "config.json", model_type="x", auto_map=names)


def _deep(directory: Path) -> None:
    change(
        directory / "config.json", text_config={"model_type": "llama", "num_hidden_layers": 5000}
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "expected a model directory, with a config.json"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: expected a JSON object"),
        (lambda d: (d / "config.json").write_text("{}"), "expected a model_type of transformers"),
        (_remote, "got 'x', and the code that its auto_map names does not run here"),
        (lambda d: change(d / "config.json", model_type="clip", architectures=[]), "image-text"),
        (lambda d: change(d / "config.json", text_config=5), "config.json: "),
        (_deep, "num_hidden_layers: expected at most 4096, got 5000"),
        (
            lambda d: change(
                d / "config.json", text_config={"model_type": "llama", "vocab_size": -1}
            ),
            "expected the config of a LlavaForConditionalGeneration, and transformers cannot build",
        ),
    ],
)
def test_no_model_directory(bare: Path, make: Callable[[Path], Any], said: str, run: Run) -> None:
    make(bare)
    done = run(bare)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("prereg: ") and said in line


def test_no_code_of_the_directory_runs(whole: Path, run: Run) -> None:
    trap = "open('ran', 'w')\nraise SystemExit(7)\n"
    for name in ("configuration_llava", "modeling_llava", "processing_llava"):
        (whole / f"{name}.py").write_text(trap)
    names = {
        "AutoConfig": "configuration_llava.LlavaConfig",
        "AutoModelForImageTextToText": "modeling_llava.Llava",
    }
    change(whole / "config.json", auto_map=names, attn_implementation="someone/kernel")
    done = run(whole)
    assert done.returncode == 0 and not (whole.parent / "ran").exists()
    assert "left out        attn_implementation, auto_map: no code but" in done.stdout
    assert "checked: " in done.stdout
    processor = {"AutoProcessor": "processing_llava.LlavaProcessor"}
    change(whole / "processor_config.json", auto_map=processor)
    done = run(whole)
    assert done.returncode == 0 and not (whole.parent / "ran").exists()
    assert "not run, since processor_config.json names code to run, at auto_map" in done.stdout


def test_how_weights_are_stored_does_not_matter(bare: Path) -> None:
    change(bare / "config.json", quantization_config={"quant_method": "fp8"})
    assert examine_model(bare)[0]["model"]["supported"] == "yes"


def test_why_a_batch_is_not_run(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch() -> str:
        report, works = examine_model(whole)
        assert works
        return str(report["batch"]["batch"])

    monkeypatch.setattr(made_up, "BYTES", 1000)
    assert batch().startswith("not run, since even at reduced size the model has ")
    monkeypatch.undo()
    monkeypatch.setattr(made_up, "reduced", lambda config: 1 // 0)
    assert batch().endswith("not to be had at reduced size: ZeroDivisionError: integer division or "
                            "modulo by zero")  # fmt: skip
    monkeypatch.undo()
    change(whole / "config.json", image_token_id=20)  # the processor's stays
    assert batch().startswith("not run, since LlavaProcessor makes no visual token")


def test_dtype_by_the_bound(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(p.numel() for p in tiny_llava().parameters())
    monkeypatch.setattr(made_up, "BYTES", 2 * parameters)
    report, works = examine_model(whole)
    assert works and report["batch"]["model"].endswith("torch.bfloat16")
    assert report["batch"]["batch"].startswith(f"checked: {PATCHES} visual tokens")


def test_the_middle_of_the_real_model(bare: Path) -> None:
    """And not of the smaller one."""
    config = AutoConfig.from_pretrained(bare)
    config.text_config.num_hidden_layers = 40
    config.save_pretrained(bare)
    assert examine_model(bare)[0]["model"]["layer"] == "20, the middle of 40"


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_type_of_the_zoo(name: str, tmp_path: Path) -> None:
    """The parts are those of the whole model, with its weights, and refusals have its words."""
    model = sample(name).model
    model.config.save_pretrained(tmp_path)
    if model.config.model_type in NEED_TIMM:
        with pytest.raises(ValueError, match="requires the timm library"):
            examine_model(tmp_path)
        return
    if name == "granite4_vision":
        read = AutoConfig.from_pretrained(tmp_path)
        if read.qformer_config.num_attention_heads == 0:
            # From 5.24 it is set to the tower's width / 64 as a config is read: 0 for one so small.
            with pytest.raises(ValueError, match="cannot build one of it: ZeroDivisionError"):
                examine_model(tmp_path)
            return
    report, works = examine_model(tmp_path)
    facts = report["model"]
    assert facts["class"] == type(model).__name__
    try:
        resolution = resolve(model)
    except ValueError as error:
        assert not works and facts["supported"] == f"no: {error}".replace("\n", " ")
        return
    assert works and facts["family"] == f"{resolution.family.name}, {resolution.origin}"
    for field, what in resolution.how.items():
        assert facts[field] == what
    assert facts["layer"].endswith(f"of {len(resolution.family.layers_of(model))}")


@pytest.mark.parametrize("name", sorted({"florence2", "internvl", "llava_next", *DEEP}))
def test_the_projector_trains_beside_an_adapter(name: str, tmp_path: Path) -> None:
    """By the words of the report: all of its modules, and nothing else than the adapter."""
    model = sample(name).model
    model.config.save_pretrained(tmp_path)
    said, _, how = examine_model(tmp_path)[0]["model"]["projector"].partition(": ")
    assert how == "beside LoRA it trains by modules_to_save"
    modules = said.split(",")
    lora = LoraConfig(target_modules=linear_of_llm(model)[:1], modules_to_save=modules)
    peft: Any = get_peft_model(model, lora)
    trains = {x for x, p in peft.named_parameters() if p.requires_grad and "lora_" not in x}
    wrapped = {x.replace(".modules_to_save.default", "") for x in trains}
    expected = {
        f"base_model.model.{x}" for x in parts_of(sample(name).model)["projector"]
        if x != "model.image_newline"  # in no module of its own
    }  # fmt: skip
    assert wrapped == expected
    assert sum("deepstack" in x for x in modules) == DEEP.get(name, 0)


def test_a_model_without_a_projector(tmp_path: Path) -> None:
    sample("chameleon").model.config.save_pretrained(tmp_path)
    report, _ = examine_model(tmp_path)
    assert report["model"]["projector"] == "none that PEFT's modules_to_save takes"


@pytest.mark.parametrize("model_type", ["lfm2_vl", "lfm2-vl"])
def test_both_names_of_a_type(model_type: str, tmp_path: Path) -> None:
    """The hub's, and that of transformers 4.57, whose own AutoConfig does not read it."""
    sample("lfm2_vl").model.config.save_pretrained(tmp_path)
    change(tmp_path / "config.json", model_type=model_type)
    report, works = examine_model(tmp_path)
    assert works and report["model"]["family"] == "LFM2-VL, listed"
    assert report["model"]["class"] == "Lfm2VlForConditionalGeneration"


@pytest.mark.skipif(HERE >= (5, 0), reason="later releases have a default")
def test_what_transformers_cannot_build_is_one_line(tmp_path: Path, run: Run) -> None:
    CONFIG_MAPPING["qwen3_vl_moe"]().save_pretrained(tmp_path)  # without rope_scaling
    done = run(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("prereg: ") and "cannot build one of it: AttributeError: " in line


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_false_alarm(name: str) -> None:
    """Of a model and its batch, whatever their type."""
    case = sample(name)
    batch = case.batches.get("images", case.batches.get("videos"))
    if families.family_of_type(case.model.config.model_type).refused:
        return
    attention = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
    visual = int((batch.visual & (attention == 1)).sum())
    said, works = made_up._checked(case.model.eval(), batch.inputs)
    seen = f"{visual} visual tokens of {batch.visual.numel()} positions"
    if name in UNSEEN:
        assert works and said.startswith(f"{seen}; warning: PRe: nothing is seen of where")
    else:
        assert (said, works) == (f"checked: {seen}, features where PRe expects them", True)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_refused_type(name: str, tmp_path: Path) -> None:
    REFUSED[name]().config.save_pretrained(tmp_path)
    report, works = examine_model(tmp_path)
    assert not works and "is not supported: " in report["model"]["supported"]


@pytest.mark.parametrize(
    ("name", "layers", "width"),
    [case for case in (
        ("florence2", 12, 1024), ("gemma4", 30, 2304), ("got_ocr2", 24, 1024),
        ("kosmos-2", 24, 2048), ("paddleocr_vl", 18, 1024), ("qwen3_vl_moe", 24, 2048),
    ) if is_here(case[0])],
)  # fmt: skip
def test_a_type_at_its_default_size(name: str, layers: int, width: int, tmp_path: Path) -> None:
    default(name).save_pretrained(tmp_path)
    report, works = examine_model(tmp_path)
    facts = report["model"]
    assert works and facts["layer"] == f"{layers // 2}, the middle of {layers}"
    assert f": {layers} " in facts["layers"] and facts["width"] == str(width)
    assert facts["head"] == f"{2 * width * (width + 1):,} parameters, with the anchor pre_llm"
