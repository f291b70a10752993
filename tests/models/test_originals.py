# SPDX-License-Identifier: Apache-2.0
"""Models outside of transformers, each by the call that docs/other_models.md has for it.

The stand-ins have the forward of the original code, `tests/models/originals.py`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prereg_kernels import Family, apply_pre, find_pre, remove_pre
from prereg_kernels.checkup import visual_features
from tests.attached import both, compare, seen
from tests.docs.pages import page_of
from tests.models.original_cases import CASES, PROCESSOR, SCENES, Batch, Case
from tests.tiny import gradients, make_batch, tiny_llava

TITLES = list(dict.fromkeys(case.title for case in CASES.values()))
MASKED = [name for name in CASES if name not in ("internvl_chat", "deepseek_vl2")]
EXPANDED = {"llava": -200, "ovis": -300}
LIMITS = {"llava": "tokenizer_model_max_length", "ovis": "multimodal_max_length"}
every_model = pytest.mark.parametrize("name", CASES)
expanded = pytest.mark.parametrize("name", EXPANDED)


def family_of(name: str, model: Any) -> Family:
    """By the page's call, which its section makes on the model, after those before it on theirs."""
    blocks = page_of("docs/other_models.md").blocks
    namespace: dict[str, Any] = {"processor": PROCESSOR}
    namespace |= {"model": tiny_llava(), "batch": make_batch()}
    exec(blocks[0].text, namespace)
    for title, block in zip(TITLES, blocks[1:], strict=True):
        is_it = title == CASES[name].title
        first = next(case for case in CASES.values() if case.title == title)
        namespace["model"] = model if is_it else first.model()
        exec(block.text, namespace)
        if is_it:
            break
    family: Family = namespace["pre"].family
    remove_pre(model)
    return family


def check(case: Case, model: Any, family: Family, batch: Batch, **settings: Any) -> None:
    """Every gradient of the model and of the heads, and the figures; nobody is told of anything."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "PRe")
        ours, expected, metrics, (lm, term) = both(
            batch.inputs, make=lambda: model, mask=batch.visual, place=case.place, family=family,
            **settings,
        )  # fmt: skip
    compare(ours, expected)
    assert metrics["visual_tokens"] == batch.visual.sum()
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7)
    assert metrics["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert (term == 0) == (not batch.visual.any())


@every_model
@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("scene", SCENES)
def test_gradients(name: str, scene: str, side: str, checkpointing: bool) -> None:
    case = CASES[name]
    model = case.model()
    batch = case.batch(scene, side, model)
    assert batch.visual.any() == (scene != "text only")
    check(case, model, family_of(name, model), batch, checkpointing=checkpointing)


@every_model
def test_gradients_of_several_layers(name: str) -> None:
    case = CASES[name]
    model = case.model()
    batch = case.batch("several images", "right", model)
    check(case, model, family_of(name, model), batch, layers=(1, 3))


@every_model
def test_the_batch_is_counted_before_the_step(name: str) -> None:
    """As trainers with exact denominators do."""
    case = CASES[name]
    model = case.model()
    batch = case.batch("several images", "right", model)
    pre = apply_pre(model, family=family_of(name, model))
    assert pre.count(batch.inputs) == batch.visual.sum()


@every_model
def test_check(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """It has nothing to say, but of embeddings that are scaled outside of their table."""
    case = CASES[name]
    model = case.model()
    pre = apply_pre(model, family=family_of(name, model))
    pre.check(case.batch("several images", "right", model).inputs)
    said = [str(w.message) for w in recwarn if "PRe" in str(w.message)]
    if name == "minicpm_v+scaled":
        assert len(said) == 1 and "nothing is seen of where the visual features are" in said[0]
    else:
        assert not said


@expanded
@pytest.mark.parametrize("is_cut", (False, True), ids=("expanded", "cut to the length of its ids"))
def test_ids_of_a_model_that_expands_them(name: str, is_cut: bool) -> None:
    """The same length does not make a position of `input_ids` one of the decoder's sequence."""
    case = CASES[name]
    model = case.model()
    batch = case.batch("several images", "right", model)
    if is_cut:
        setattr(model.config, LIMITS[name], batch.inputs["input_ids"].shape[1])
    path = family_of(name, model).layers
    family = Family(name, layers=path, visual_tokens=(EXPANDED[name],))
    for call in (lambda: find_pre(model).check(batch.inputs), lambda: model(**batch.inputs)):
        apply_pre(model, family=family)
        with pytest.raises(
            ValueError, match=r"input_ids: .*several rows in place of one id.*visual_mask"
        ):
            call()
        remove_pre(model)


@expanded
def test_gradients_of_a_sequence_that_is_cut(name: str) -> None:
    """Its attention mask has the decoder's shape, and is of another sequence."""
    case = CASES[name]
    model = case.model()
    batch = case.batch("several images", "right", model)
    length = batch.inputs["input_ids"].shape[1]
    setattr(model.config, LIMITS[name], length)
    visual = batch.visual[:, :length]
    hidden = visual & ~batch.inputs["attention_mask"].bool()
    assert hidden.any() and visual.sum() < batch.visual.sum()
    family = family_of(name, model)
    check(case, model, family, Batch(batch.inputs, visual))
    if name == "ovis":  # its other tokens are cut, too, and are only counted
        return
    apply_pre(model, family=other_mask(family, lambda mask: mask & ~hidden))
    with pytest.warns(UserWarning, match=r"get features and are not in family\.visual_mask"):
        model(**batch.inputs).loss.backward()


def other_mask(family: Family, change: Any) -> Family:
    """The family with a mask function that is wrong."""
    right = family.visual_mask
    assert right is not None

    def wrong(batch: Mapping[str, Any]) -> Tensor:
        mask: Tensor = change(right(batch))
        return mask

    return dataclasses.replace(family, visual_mask=wrong)


@pytest.mark.parametrize("name", [name for name in MASKED if name != "minicpm_v+scaled"])
def test_a_mask_that_is_wrong(name: str) -> None:
    """Other positions are an error, some of the positions a warning."""
    case = CASES[name]
    model = case.model()
    batch = case.batch("several images", "right", model)
    family = family_of(name, model)

    def without_the_last(mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask.view(-1)[mask.view(-1).nonzero()[-1]] = False
        return mask

    apply_pre(model, family=other_mask(family, lambda mask: mask.roll(3, 1)))
    with pytest.raises(ValueError, match=r"enter .* as plain rows of the embedding table"):
        model(**batch.inputs)
    remove_pre(model)
    apply_pre(model, family=other_mask(family, without_the_last))
    with pytest.warns(UserWarning, match=r"PRe: \d positions of the .* get features and are not"):
        model(**batch.inputs).loss.backward()
    remove_pre(model)
    apply_pre(model, family=other_mask(family, lambda mask: mask[:, 1:]))
    with pytest.raises(ValueError, match=r"family\.visual_mask: .*expected the decoder's sequence"):
        model(**batch.inputs)


def test_a_loss_of_the_training_script() -> None:
    """MiniCPM-V's computes it from the logits: backward adds the term's gradient by itself."""
    case = CASES["minicpm_v"]
    model = case.model()
    family = family_of("minicpm_v", model)
    data, labels = case.batch("several images", "right", model).inputs.values()
    pre = apply_pre(model, family=family)
    logits = model(data).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, labels[:, 1:].flatten()).backward()
    ours, tokens = gradients(model), pre.metrics()["visual_tokens"]
    model = case.model()
    batch = case.batch("several images", "right", model)
    _, expected, *_ = both(
        batch.inputs, make=lambda: model, mask=batch.visual, place=case.place, family=family
    )
    compare(ours, expected)
    assert tokens == batch.visual.sum()


def test_text_that_comes_first_moves_no_anchor() -> None:
    """LLaVA's LLM gets ids where a batch has no images, embeddings where it has."""
    found = []
    for comes_first in (False, True):
        model = CASES["llava"].model()
        family = family_of("llava", model)
        # The first layer's input is another than what enters the decoder
        model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
        text, batch = (
            CASES["llava"].batch(s, "right", model).inputs for s in ("text only", "some text")
        )
        apply_pre(model, family=family)
        if comes_first:
            model(**text | {"images": None}).loss.backward()
            model.zero_grad()
        model(**batch).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@every_model
def test_without_a_family_nothing_is_attached(name: str) -> None:
    """Nor is the LLM inside, which knows no visual token, called the model to attach to."""
    with pytest.raises(ValueError, match=r"is not supported: .*Family") as error:
        apply_pre(CASES[name].model())
    assert "call apply_pre(model." not in str(error.value)


class Plain(nn.Module):
    """A model that is none of transformers', without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CASES["internvl_chat"].model()

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        return self.inner(input_ids=input_ids, **inputs)


def test_a_model_without_a_config() -> None:
    case = CASES["internvl_chat"]
    batch = case.batch("some text", "right", None)
    layers = "inner.language_model.model.layers"
    family = Family("Plain", layers=layers, visual_tokens=(PROCESSOR.image_token_id,))
    place = dataclasses.replace(case.place, language_model="inner.language_model.model")
    torch.manual_seed(0)
    ours, expected, metrics, _ = both(
        batch.inputs, make=Plain, mask=batch.visual, place=place, family=family
    )
    compare(ours, expected)
    assert metrics["visual_tokens"] == batch.visual.sum()
    with pytest.raises(ValueError, match=r"has no config, or no get_decoder\(\)"):
        apply_pre(Plain(), family=Family("Plain", visual_tokens=(38,)))


def test_a_model_without_an_embedding_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES["ovis"].model()
    nothing = property()  # an AttributeError
    monkeypatch.setattr(type(model.llm.model), "get_input_embeddings", nothing, raising=False)
    family = Family(
        "Ovis", language_model="llm.model", layers="llm.model.layers", visual_tokens=(-300,)
    )
    with pytest.raises(ValueError, match=r"model: expected Ovis or 'llm\.model' to have get_input"):
        apply_pre(model, family=family)


def test_the_checkup_reads_the_same_positions() -> None:
    case = CASES["llava"]
    model = case.model().eval()
    batch = case.batch("several images", "right", model)
    length = batch.inputs["input_ids"].shape[1]
    model.config.tokenizer_model_max_length = length
    features = visual_features(model, batch.inputs, family_of("llava", model))
    with seen(model, case.place) as states, torch.no_grad():
        model(**batch.inputs)
    for layer, rows in enumerate(features):
        assert torch.equal(rows, states[layer][batch.visual[:, :length]])
