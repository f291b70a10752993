# SPDX-License-Identifier: Apache-2.0
"""Models outside of the table, models inside of wrappers, and what their errors say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prereg_kernels import apply_pre, remove_pre
from prereg_kernels.attach.families import FAMILIES
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.resolver import resolve
from tests.attach.families.models import CASES, WIDTH, WORDS, make_model
from tests.attach.test_regularizer import traces
from tests.attached import Place, both, compare
from tests.tiny import make_batch as make_llava_batch
from tests.tiny import tiny_llava

PATCH = 9  # the id of a visual token


class Block(nn.Module):
    """A decoder layer that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        mixed = hidden.cumsum(dim=1) / hidden.shape[1]
        return hidden + self.linear(self.norm(mixed)).tanh(), "attention weights"


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, mask: Tensor, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds, attentions = layer(inputs_embeds)
            assert attentions == "attention weights"
        return inputs_embeds


class PlainModel(nn.Module):
    """No transformers: other names, layers that return tuples, arguments by position."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_id=PATCH, unset_id=None)
        self.words, self.pixels = nn.Embedding(WORDS, WIDTH), nn.Linear(5, WIDTH)
        self.llm, self.out = nn.ModuleDict({"text": Decoder()}), nn.Linear(WIDTH, WORDS)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_decoder(self) -> nn.Module:
        return self.llm["text"]

    def forward(self, input_ids: Tensor, pixels: Tensor, labels: Tensor) -> SimpleNamespace:
        visual = (input_ids == PATCH)[..., None]
        embeddings = self.words(input_ids).masked_scatter(visual, self.pixels(pixels))
        logits = self.out(self.llm["text"](input_ids != 0, embeddings))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.mT, labels))


PLAIN = Family("Plain", language_model="llm.text", layers="llm.text.layers",
               visual_tokens=("patch_id",))  # fmt: skip


def plain_model() -> PlainModel:
    torch.manual_seed(0)
    return PlainModel()


def plain_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(10, WORDS, (2, 8), generator=generator)
    input_ids[0, 2:5] = input_ids[1, :4] = PATCH
    return {
        "input_ids": input_ids,
        "pixels": torch.randn(7, 5, generator=generator),
        "labels": torch.randint(0, WORDS, (2, 8), generator=generator),
    }


@pytest.mark.parametrize("layers", (None, (1, 4)))
def test_gradients_of_a_model_outside_of_the_table(layers: Any) -> None:
    batch = plain_batch()
    ours, expected, metrics, (_, term) = both(
        batch, make=plain_model, mask=batch["input_ids"] == PATCH, family=PLAIN, layers=layers
    )
    compare(ours, expected)
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4)
    assert metrics["visual_tokens"] == 7


def test_a_model_of_a_type_that_nobody_listed() -> None:
    """LLaVA's layout under another model_type: all is found, and the gradients are the same."""
    batch, found, listed = make_llava_batch(), tiny_llava(), tiny_llava()
    found.config.model_type = "llava_of_tomorrow"
    handles = apply_pre(found), apply_pre(listed)
    for model in (found, listed):
        model(**batch).loss.backward()
    assert handles[0].metrics() == handles[1].metrics()
    for ours, theirs in zip(found.parameters(), listed.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    with pytest.raises(ValueError, match="does not say which visual tokens belong to one image"):
        remove_pre(found), apply_pre(found, level="global")


def test_the_error_shows_the_families_and_a_call_that_works() -> None:
    with pytest.raises(ValueError) as info:
        apply_pre(plain_model())
    message = str(info.value)
    assert "PlainModel (model_type None) is not supported" in message
    known = re.search(r"Known model_types: (.*)$", message).group(1).split(", ")
    assert known == [t for family in FAMILIES if not family.refused for t in family.model_types]
    import_line, call = re.search(
        r"(from \S+ import Family); (apply_pre\(.*\))\. K", message
    ).groups()
    scope = {"model": tiny_llava(), "apply_pre": apply_pre}
    exec(f"{import_line}\n{call}", scope)
    assert list(scope["model"].pre_heads) == ["2"]


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_in_the_table(name: str) -> None:
    resolution = resolve(make_model(name))
    assert resolution.origin == "listed"
    assert [f for f in FAMILIES if name in f.model_types] == [
        f for f in FAMILIES if f.name == resolution.family.name
    ]


@pytest.mark.parametrize(
    "fields, message",
    (
        (
            {"layers": "llm.txt.layers"},
            r"family\.layers: there is no 'llm\.txt\.layers' in PlainModel: model\.llm, a "
            r"ModuleDict, has no submodule 'txt'; it has text",
        ),
        (
            {"language_model": "decoder"},
            r"family\.language_model: there is no 'decoder' in PlainModel: model, a PlainModel, "
            r"has no submodule 'decoder'; it has words, pixels, llm, out",
        ),
        (
            {"layers": "words"},
            r"family\.layers: expected an nn\.ModuleList of decoder layers at 'words', got "
            r"Embedding with no submodules",
        ),
        (
            {"layers": "llm.text"},
            r"family\.layers: expected an nn\.ModuleList .* 'llm\.text', got Decoder with layers",
        ),
        (
            {"visual_tokens": ("image_token_id",)},
            r"family\.visual_tokens: expected the id of a token at "
            r"model\.config\.image_token_id, got no such attribute in SimpleNamespace",
        ),
        ({"visual_tokens": ("patch_id", "unset_id")}, r"model\.config\.unset_id, got None"),
    ),
)
def test_a_family_that_does_not_fit(fields: dict[str, Any], message: str) -> None:
    model = plain_model()
    before = traces(model)
    family = Family(**{**vars(PLAIN), **fields})
    with pytest.raises(ValueError, match=message):
        apply_pre(model, family=family)
    assert traces(model) == before


class MergingDecoder(Decoder):
    """Puts the visual features in place of words itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.scale = nn.Embedding(WORDS, WIDTH), 3.0

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        visual = (input_ids == PATCH)[..., None]
        states = self.words(input_ids).masked_scatter(visual, features) * self.scale
        return super().forward(input_ids != 0, states)


class MergingModel(PlainModel):
    def __init__(self) -> None:
        super().__init__()
        self.llm = nn.ModuleDict({"text": MergingDecoder()})

    def get_input_embeddings(self) -> nn.Module:
        return self.llm["text"].words

    def forward(self, input_ids: Tensor, pixels: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.out(self.llm["text"](input_ids, self.pixels(pixels)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.mT, labels))


def merging_model() -> MergingModel:
    torch.manual_seed(0)
    return MergingModel()


def test_a_language_model_that_gets_no_inputs_embeds() -> None:
    """What enters the first of its layers is the anchor."""
    batch = plain_batch()
    ours, expected, *_ = both(
        batch, make=merging_model, mask=batch["input_ids"] == PATCH, family=PLAIN,
        place=Place("llm.text", is_merged_inside=True),
    )  # fmt: skip
    compare(ours, expected)


@pytest.mark.parametrize("family", ("llava", FAMILIES))
def test_family_has_to_be_one(family: Any) -> None:
    with pytest.raises(TypeError, match=r"family: expected a Family or None, got (str|tuple)"):
        apply_pre(tiny_llava(), family=family)


@pytest.mark.parametrize("tokens", ("image_token_id", (True,), [32000], 3))
@pytest.mark.parametrize("field", ("visual_tokens", "other_tokens"))
def test_tokens_have_to_be_ids_or_names(field: str, tokens: Any) -> None:
    with pytest.raises(TypeError, match=f"{field}: expected a tuple of ids, or of names"):
        Family("Mine", **{field: tokens})
    with pytest.raises(
        ValueError, match=r"visual_tokens: expected one at least, or None, got \(\)"
    ):
        Family("Mine", visual_tokens=())


def test_a_config_without_the_image_token() -> None:
    model = make_model("gemma3")
    model.config.image_token_id = None
    message = r"its config has no id of a visual token \(image_token_id, .*give the id itself"
    with pytest.raises(ValueError, match=message):
        apply_pre(model)


@pytest.mark.parametrize("field", ("layers", "language_model", "projector"))
def test_paths_have_to_be_paths(field: str) -> None:
    with pytest.raises(TypeError, match=f"{field}: expected the path of a submodule or None, got"):
        Family("Mine", **{field: 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "rows"}, "layout: expected 'crop', 'tiles', 'blocks', a function or None, got"),
        ({"markers": ("start_id",)}, "markers: expected one before and one after"),
    ],
)
def test_facts_of_the_checkup_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Family("Mine", **fields)
    with pytest.raises(TypeError, match="towers: expected a tuple of names of vision encoders"):
        Family("Mine", towers="clip_vision_model")


# Wrappers.


class Wrapper(nn.Module):
    """The model at base_model.model, its names passed on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})
        self.config = model.config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model")["model"], name)

    def forward(self, **inputs: Any) -> Any:
        return self.base_model["model"](**inputs)


class PeftModel(Wrapper):
    """What peft's does for those around it."""

    @property
    def peft_config(self) -> dict[str, None]:
        return {"default": None}

    def get_base_model(self) -> nn.Module:
        return self.base_model["model"]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "of names": (Wrapper, "base_model.model"),
    "compile": (torch.compile, "_orig_mod"),
    "data_parallel": (nn.DataParallel, "module"),
    "ddp": (nn.parallel.DistributedDataParallel, "module"),
    "ddp of peft": (
        lambda model: nn.parallel.DistributedDataParallel(PeftModel(model)),
        "module.base_model.model",
    ),
}


@pytest.mark.parametrize("wrap, path", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_a_wrapped_model_is_refused(wrap: Any, path: str) -> None:
    model = tiny_llava()
    wrapper = wrap(model)
    before = traces(model)
    message = (
        r"model: expected the LlavaForConditionalGeneration itself, got a "
        rf"{type(wrapper).__name__} around it; call apply_pre\(model\.{re.escape(path)}\)"
    )
    with pytest.raises(ValueError, match=message):
        apply_pre(wrapper)
    assert traces(model) == before
    assert wrapper.get_submodule(path) is model


def test_paths_do_not_lead_through_names_that_a_wrapper_passes_on() -> None:
    wrapper = Wrapper(tiny_llava())
    assert wrapper.model is wrapper.base_model["model"].model
    message = "in Wrapper: model, a Wrapper, has no submodule 'model'; it has base_model"
    paths = {"language_model": "model.language_model", "layers": "model.language_model.layers"}
    with pytest.raises(ValueError, match=message):
        apply_pre(wrapper, family=Family("LLaVA", **paths))


@pytest.mark.parametrize("wrap", (PeftModel, nn.DataParallel), ids=("peft", "data_parallel"))
def test_the_model_in_a_wrapper_works(wrap: Any) -> None:
    batch, frozen = make_llava_batch(), tiny_llava().requires_grad_(False)
    wrapper = wrap(frozen)
    pre = apply_pre(frozen)
    wrapper(**batch).loss.backward()
    alone = tiny_llava().requires_grad_(False)
    expected = apply_pre(alone)
    alone(**batch).loss.backward()
    for ours, theirs in zip(pre.heads[2].parameters(), expected.heads[2].parameters(), strict=True):
        assert ours.grad.norm() > 0 and torch.equal(ours.grad, theirs.grad)
