# SPDX-License-Identifier: Apache-2.0
"""A model directory's files: what is taken from them, and one line for what cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers.utils import hub

from prereg_kernels.checkup.loading import load
from prereg_kernels.checkup.model_files import CODE, naming, offline, read_config
from tests.checkup.pictures import save_model, save_tokenizer
from tests.releases import HERE


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_model(tmp_path_factory.mktemp("models") / "llava", "llava", processor=False)
    settings = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }  # fmt: skip
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    save_tokenizer(model, "{% for m in messages %}hello <image>{% endfor %}")
    return model


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _written(name: str, content: str | bytes) -> Callable[[Path], None]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda model: (model / name).write_bytes(raw) and None


def _cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _linked(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("config.json")


def _adapter_alone(model: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")


def _lora(model: Path) -> None:
    (model / "config.json").unlink()
    about = {"base_model_name_or_path": "llava-hf/llava"}
    (model / "adapter_config.json").write_text(json.dumps(about))


def _sharded(model: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "absent.safetensors"}}
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _processor(name: str, **settings: Any) -> Callable[[Path], None]:
    return _written(
        "preprocessor_config.json", json.dumps({"image_processor_type": name, **settings})
    )


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cut, "model.safetensors: expected a whole safetensors file"),
        (_written("model.safetensors", b""), "model.safetensors: expected a whole safetensors"),
        (_written("model.safetensors", b"\xff" * 99), "model.safetensors: expected a whole safe"),
        (_sharded, "absent.safetensors"),
        (_written("config.json", DEEP), "config.json: not valid JSON: it is nested too deeply"),
        (_written("config.json", b"\xff\xfe{"), "config.json: not valid JSON"),
        (_written("config.json", "[1]"), "config.json: expected a JSON object, got list"),
        (_written("config.json", "{}"), "model: model_type 'None': the places of its visual"),
        (_linked, "model: expected a model directory, with a config.json in it"),
        (_adapter_alone, "it is a LoRA adapter: merge the adapter into its model first"),
        (_lora, "it is a LoRA adapter of llava-hf/llava: merge the adapter into its model first"),
        (_written("adapter_config.json", "{}"), "adapter_config.json: expected a whole model"),
        (_config(quantization_config={"quant_method": "fp8"}), "config.json: quantization_config"),
        (
            _config(text_config={"model_type": "timm_backbone"}),
            "config.json: text_config: expected",
        ),
        (_config(text_config=5), "config.json: "),
        (_config(vision_config={"model_type": "dinov2"}), "tower of model_type 'dinov2'"),
        (_config(vision_config={"model_type": "clip_vision_model"}), "model: "),
        (_config(text_config={"model_type": "llama", "num_hidden_layers": 10**9}), "10000000"),
        (_config(dtype="float31"), "config.json: "),
        (_written("tokenizer.json", '{"version": "1.0"}'), "model: "),
        (_written("tokenizer.json", DEEP), "model: "),
        (_written("tokenizer_config.json", DEEP), "model: "),
        (
            _written("tokenizer_config.json", '{"tokenizer_class": "X", "auto_map": {"a": 1}}'),
            # The words of tokenizer.json are enough, but for transformers 4.57
            "" if HERE >= (5, 0) else "model: Tokenizer class X does not exist",
        ),
        (_written("preprocessor_config.json", DEEP), "preprocessor_config.json: not valid JSON"),
        (_written("preprocessor_config.json", "[]"), "preprocessor_config.json: expected the JSON"),
        (_processor("Qwen2VLImageProcessor", size=7), "preprocessor_config.json: "),
        (
            _processor("CLIPImageProcessor", size={"height": 9**9, "width": 9}),
            "preprocessor_config.json: the image processor would make more than",
        ),
        (_processor("os.system"), "preprocessor_config.json: expected an ima"),
    ],
)
def test_one_error_that_names_the_file(
    model: Path, change: Callable[[Path], None], message: str
) -> None:
    change(model)
    if not message:
        assert load(model).tokenizer is not None
        return
    with pytest.raises(ValueError) as caught:
        load(model)
    assert message in str(caught.value)
    assert str(model) in str(caught.value)


def test_what_names_code_is_left_out_at_any_depth(model: Path) -> None:
    plain, none = read_config(model)
    assert none == []
    content = json.loads((model / "config.json").read_text())
    for key in CODE:
        for part in (content, content["text_config"], content["vision_config"]):
            part[key] = "org/kernel"
    (model / "config.json").write_text(json.dumps(content))
    config, left_out = read_config(model)
    assert left_out == sorted(CODE)
    assert config.to_dict() == plain.to_dict()
    assert "org/kernel" not in repr([vars(config), vars(config.text_config)])
    assert config._attn_implementation is None
    loaded = load(model)
    assert loaded.config.text_config._attn_implementation == "sdpa"
    (note,) = (note for note in loaded.notes if "may name code" in note)
    assert "_attn_implementation" in note


def test_a_processor_without_patches(tmp_path: Path) -> None:
    model = save_model(tmp_path / "qwen")
    _processor("Qwen2VLImageProcessor", patch_size=0, merge_size=2)(model)
    with pytest.raises(ValueError, match=r"qwen/preprocessor_config.json: refused by the image"):
        load(model)


def test_panics_are_errors_and_signals_are_not() -> None:
    """Rust's libraries panic with an exception that is none."""

    class PanicException(BaseException):
        pass

    with (
        pytest.raises(ValueError, match=r"^a/b: PanicException: index out of$"),
        naming("a/b"),
    ):
        raise PanicException("index out\nof")
    with pytest.raises(KeyboardInterrupt), naming("a"):
        raise KeyboardInterrupt


def test_offline_ends_where_it_ends() -> None:
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(OSError), offline():
        assert constants.HF_HUB_OFFLINE and hub.is_offline_mode()
        raise OSError
    assert before == constants.HF_HUB_OFFLINE == hub.is_offline_mode()
