# SPDX-License-Identifier: Apache-2.0
"""LoRA and QLoRA with PRe: PEFT before or after it; what trains, what is saved, what is left.

`make test` runs this with older PEFTs as well, which trainers pin: with a `task_type` these call
`model.forward`, past the hooks of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Qwen3VLConfig

from prereg_kernels import apply_pre, find_pre, remove_pre
from prereg_kernels.attach.handle import PRe
from prereg_kernels.attach.projector_hook import ProjectorHook
from prereg_kernels.train.parts import parts_of
from tests.attach.families.batches import make_batch
from tests.attach.families.models import make_model
from tests.attach.misplaced import ERROR, FAMILY, right_batch, wrong_batch
from tests.attach.test_regularizer import traces
from tests.attached import NON_REENTRANT, compare, eager_term
from tests.releases import neftune_post_forward_hook
from tests.tiny import IMAGE_TOKEN, tiny_llava
from tests.trainers.rows import make_trainer
from tests.zoo import sample

DECODER = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
each_family = pytest.mark.parametrize("name", ("llava", "qwen2_5_vl"))


def with_lora(model: Any, seed: int = 0) -> Any:
    """LoRA on the decoder's matrices, not zero at the start."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=2, target_modules=DECODER, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def attach(model: Any, order: str, **overrides: Any) -> tuple[Any, PRe]:
    """The model with LoRA, and PRe's handle."""
    if order == "LoRA first":
        lora = with_lora(model)
        return lora, apply_pre(lora, **overrides)
    pre = apply_pre(model, **overrides)
    lora = with_lora(model)
    thaw(pre)
    return lora, pre


def thaw(pre: PRe) -> None:
    for head in pre.heads.values():
        head.requires_grad_(True)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def take_gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """And leave none."""
    grads = {}
    for name, p in parameters.items():
        grads[name], p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
    return grads


def check_gradients(lora: Any, pre: PRe, batch: Any) -> None:
    """Adapter and heads against the definition on the same model; nothing else has any."""
    parameters = trained(lora)
    assert all("lora_" in name or "pre_heads" in name for name in parameters)
    lora(**batch.inputs).loss.backward()
    assert all(p.grad is None for p in lora.parameters() if not p.requires_grad)
    ours = take_gradients(parameters)
    remove_pre(lora)
    lora.gradient_checkpointing_disable()  # states of a first pass without grad have no gradient
    lm, term = eager_term(lora.base_model.model, batch.inputs, pre.heads, batch.visual)
    (lm + pre.config.weight * term).backward()
    compare(ours, take_gradients(parameters))


@pytest.mark.parametrize("checkpointing", (None, NON_REENTRANT, {"use_reentrant": True}))
@pytest.mark.parametrize("order", ("LoRA first", "PRe first"))
@each_family
def test_gradients(name: str, order: str, checkpointing: Any) -> None:
    model = make_model(name)
    batch = make_batch(name, model)
    lora, pre = attach(model, order, weight=3.0)
    if checkpointing:
        lora.gradient_checkpointing_enable(checkpointing)
        if checkpointing["use_reentrant"]:
            lora.enable_input_require_grads()  # from 5 on, checkpointing does it
    check_gradients(lora, pre, batch)


@pytest.mark.parametrize("order", ("LoRA first", "PRe first"))
@each_family
def test_adapter_and_head_train_and_nothing_else(name: str, order: str) -> None:
    model = make_model(name)
    batch = make_batch(name, model).inputs
    lora, pre = attach(model, order)
    before = {name: p.clone() for name, p in lora.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(4):
        lora(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(pre.metrics()["pre_loss"])
    moved = {name for name, p in lora.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(lora).keys()
    assert any("pre_heads" in name for name in moved) and any("lora_A" in name for name in moved)
    assert values[-1] < values[0] - 0.1


def test_heads_that_lora_froze_raise() -> None:
    """In the first training step; that the heads never train is otherwise hard to notice."""
    model, batch = make_model("llava"), make_batch("llava", make_model("llava")).inputs
    pre = apply_pre(model)
    lora = with_lora(model)
    with pytest.raises(ValueError, match=r"pre\.heads: expected heads that train.*PEFT freezes"):
        lora(**batch)
    lora.eval()(**batch)
    thaw(pre)
    lora.train()(**batch).loss.backward()


@pytest.mark.parametrize("remove_from", ("the PeftModel", "the model"))
def test_the_model_inside_is_what_it_attaches_to(remove_from: str) -> None:
    lora = with_lora(make_model("llava"))
    model, before = lora.get_base_model(), traces(lora)
    pre = apply_pre(lora, layers=1)
    assert find_pre(lora) is find_pre(model) is pre
    assert list(model.pre_heads) == ["1"] and not hasattr(type(lora), "pre_heads")
    assert all(p.requires_grad for p in pre.heads[1].parameters())
    with pytest.raises(ValueError, match="PRe is attached already"):
        apply_pre(lora)
    remove_pre(lora if remove_from == "the PeftModel" else model)
    assert traces(lora) == before


def test_adapters_of_the_models_own() -> None:
    """As transformers' `add_adapter` injects them: the model is no wrapper."""
    model = make_model("llava")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=DECODER), model)
    assert hasattr(model, "peft_config")
    pre = apply_pre(model)
    model.train()(**make_batch("llava", model).inputs).loss.backward()
    assert all(p.grad.norm() > 0 for p in pre.heads[2].parameters())


@pytest.mark.parametrize("order", ("LoRA first", "PRe first"))
def test_resumed_training_is_uninterrupted_training(tmp_path: Path, order: str) -> None:
    """A checkpoint has the adapter, and the heads beside it."""
    states = []
    for seed, checkpoint in ((0, None), (5, str(tmp_path / "checkpoint-2"))):
        lora, pre = attach(tiny_llava(), order, seed=seed)
        trainer = make_trainer(
            lora, tmp_path, per_device_train_batch_size=2, max_steps=4, save_strategy="steps",
            save_steps=2,
        )  # fmt: skip
        before = pre.heads[2].weight_0.clone()
        trainer.train(resume_from_checkpoint=checkpoint)
        assert not torch.equal(pre.heads[2].weight_0, before)
        states.append({name: x.clone() for name, x in lora.state_dict().items()})
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "pre"} <= files and "model.safetensors" not in files
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], x) for name, x in states[0].items())


def test_an_adapter_file_has_no_heads(tmp_path: Path) -> None:
    """What is loaded without PRe must load without surprises."""
    lora, _ = attach(make_model("llava"), "PRe first")
    lora.save_pretrained(tmp_path)
    batch = make_batch("llava", make_model("llava")).inputs
    again = peft.PeftModel.from_pretrained(make_model("llava"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, lora.eval()(**batch).logits)
    names = peft.get_peft_model_state_dict(lora)
    assert names and not any("pre_heads" in name for name in names)


@pytest.mark.parametrize("remove_first", (False, True))
def test_merged_it_is_a_plain_model(tmp_path: Path, remove_first: bool) -> None:
    plain = make_model("llava")
    batch = make_batch("llava", plain).inputs
    lora, _ = attach(make_model("llava"), "PRe first")
    lora(**batch).loss.backward()
    with torch.no_grad():
        expected = lora.eval()(**batch).logits
    if remove_first:
        remove_pre(lora)
    merged = lora.merge_and_unload()
    if not remove_first:
        remove_pre(merged)
    assert list(merged.state_dict()) == list(plain.state_dict())
    merged.save_pretrained(tmp_path)
    loaded, info = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=1e-4, atol=1e-4)


QUANTISED = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def quantised(path: Path, kind: str) -> Any:
    """As QLoRA prepares it: the decoder's matrices quantised and frozen, the rest in float32."""
    make_model("llava").save_pretrained(path)
    config = QUANTISED[kind]
    config.llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]
    model = type(make_model("llava")).from_pretrained(path, quantization_config=config)
    return peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs=NON_REENTRANT
    ).train()


@pytest.mark.parametrize("order", ("LoRA first", "PRe first"))
@pytest.mark.parametrize("kind", QUANTISED)
def test_gradients_over_a_quantised_base(tmp_path: Path, kind: str, order: str) -> None:
    model = quantised(tmp_path, kind)
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    assert weight.dtype == (torch.uint8 if kind == "nf4" else torch.int8)
    batch = make_batch("llava", make_model("llava"))
    lora, pre = attach(model, order, weight=3.0)
    assert {p.dtype for p in pre.heads[2].parameters()} == {torch.float32}
    check_gradients(lora, pre, batch)


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": False},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, IMAGE_TOKEN]},
}


@pytest.mark.parametrize("settings", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("noise", (False, True))
@pytest.mark.parametrize("order", ("LoRA first", "PRe first"))
def test_the_check_of_the_first_steps_sees_trained_embeddings(
    order: str, noise: bool, settings: dict[str, Any]
) -> None:
    """The rows that the adapters return, with Trainer's noise in them, are those of the table."""
    model = tiny_llava()
    if order == "PRe first":
        apply_pre(model, family=FAMILY)
    torch.manual_seed(0)
    lora: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))
    if order == "LoRA first":
        apply_pre(model, family=FAMILY)
    thaw(model._prereg)
    if noise:
        embeddings = model.get_input_embeddings()
        embeddings.neftune_noise_alpha = 5.0
        embeddings.register_forward_hook(neftune_post_forward_hook)
    for _ in range(2):  # silent: a warning is an error here
        lora(**right_batch()).loss.backward()
    model._prereg.check(right_batch())
    for _ in range(2):
        without_labels = {name: x for name, x in wrong_batch().items() if name != "labels"}
        with pytest.raises(ValueError, match=ERROR):
            lora(**without_labels)


def test_the_check_of_the_first_steps_with_a_prefix() -> None:
    """A cache in each training call, and an attention mask that is longer than the ids."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=4, token_dim=24,
        num_attention_heads=2,
    )  # fmt: skip
    model = tiny_llava()
    apply_pre(model, family=FAMILY)
    tuned: Any = peft.get_peft_model(model, config)
    thaw(model._prereg)
    with pytest.raises(ValueError, match=ERROR):
        tuned(**wrong_batch())
    tuned(**right_batch()).loss.backward()


WHOLE = {
    "llava": "multi_modal_projector", "qwen3_vl": "merger", "gemma3": "multi_modal_projector",
    "smolvlm": "connector",
}  # fmt: skip


@pytest.mark.parametrize("order", ("LoRA first", "PRe first"))
@pytest.mark.parametrize("name", WHOLE)
def test_a_projector_that_trains_whole(name: str, order: str) -> None:
    """PEFT trains a copy: its input is the anchor, and with it goes no copy of the model."""
    model = make_model(name)
    batch, before = make_batch(name, model), traces(model)
    plain = apply_pre(model, anchor="pre_projector", value_in_eval=True)
    model(**batch.inputs).loss.backward()
    expected = plain.metrics()["pre_loss"]
    remove_pre(model)
    model.zero_grad()
    assert traces(model) == before

    settings: Any = {"anchor": "pre_projector", "value_in_eval": True}
    config = peft.LoraConfig(
        target_modules=r".*(language|text)_model.*q_proj", modules_to_save=[WHOLE[name]]
    )
    if order == "LoRA first":
        lora: Any = peft.get_peft_model(model, config)
        pre = apply_pre(lora, **settings)
    else:
        pre = apply_pre(model, **settings)
        lora = peft.get_peft_model(model, config)
        thaw(pre)
    lora(**batch.inputs).loss.backward()
    assert pre.metrics()["pre_loss"] == pytest.approx(expected, rel=1e-6)
    assert any(p.grad is not None for n, p in lora.named_parameters() if "modules_to_save" in n)
    with lora.disable_adapter(), torch.no_grad():
        lora.eval()(**batch.inputs)
    assert pre.metrics()["pre_loss"] == pytest.approx(expected, rel=1e-6)
    hooks = [hook for m in lora.modules() for hook in m._forward_pre_hooks.values()]
    ours = [hook for hook in hooks if isinstance(hook, ProjectorHook)]
    assert len(ours) >= 1 and {id(hook._hooks.model) for hook in ours} == {id(model)}
    remove_pre(lora)
    assert not any(
        isinstance(hook, ProjectorHook)
        for m in lora.modules() for hook in m._forward_pre_hooks.values()
    )  # fmt: skip
    lora.train()(**batch.inputs).loss.backward()


def test_the_names_of_qwen3_vl() -> None:
    """The trainers' pages have them; PEFT itself takes no list of modules."""

    def trains(*names: str) -> set[str]:
        model = sample("qwen3_vl").model
        config = peft.LoraConfig(target_modules=DECODER, modules_to_save=list(names))
        lora = peft.get_peft_model(model, config)
        whole = {n for n, p in lora.named_parameters() if p.requires_grad and "lora_" not in n}
        return {
            n.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            for n in whole
        }

    projector = set(parts_of(sample("qwen3_vl").model)["projector"])
    count = len(sample("qwen3_vl").model.model.visual.deepstack_merger_list)
    assert count > 1
    merger = {name for name in projector if "deepstack" not in name}
    assert merger and trains("merger") == merger < projector
    each = [f"deepstack_merger_list.{i}" for i in range(count)]
    assert trains("merger", *each) == projector
    with pytest.raises(TypeError, match="ModuleList"):
        trains("merger", "deepstack_merger_list")
    assert trains("multi_modal_projector") == set()  # which it passes over without a word
    assert len(Qwen3VLConfig().vision_config.deepstack_visual_indexes) == 3


def test_all_linear_adapts_the_projector() -> None:
    """docs/trainers/trl.md says so."""
    lora = peft.get_peft_model(tiny_llava(), peft.LoraConfig(target_modules="all-linear"))
    trains = {n for n, p in lora.named_parameters() if p.requires_grad}
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name and "lora_A" in name for name in trains), part
