# SPDX-License-Identifier: Apache-2.0
"""What stands beside a saved model, and what comes back of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlavaForConditionalGeneration

from prereg_kernels import PReConfig, PReHead, apply_pre, remove_pre
from prereg_kernels.attach.handle import state_of
from prereg_kernels.attach.storage import load_heads
from tests.attach.test_regularizer import traces
from tests.attached import anchor_of_pixels
from tests.tiny import IMAGE_TOKEN, WIDTH, gradients, make_batch, tiny_llava

FILE = "pre_heads.safetensors"


def same_heads(a: Any, b: Any) -> bool:
    ours, theirs = (state_of(pre).model.pre_heads.state_dict() for pre in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], x) for n, x in theirs.items())


def files_in(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_save_pretrained_writes_a_plain_model_and_pre_beside_it(tmp_path: Path) -> None:
    model, batch = tiny_llava(), make_batch()
    model.save_pretrained(tmp_path / "plain")
    pre = apply_pre(model, layers=(1, 3), seed=4)
    model.save_pretrained(tmp_path / "ours")
    plain, ours = files_in(tmp_path / "plain"), files_in(tmp_path / "ours")
    assert ours == plain | {f"pre/{FILE}"}
    for name in plain:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    loaded, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    again = apply_pre(loaded, from_pretrained=tmp_path / "ours")
    assert same_heads(again, pre) and again.config == pre.config.replace(layers=(1, 3))


def test_after_training_the_model_has_no_trace(tmp_path: Path) -> None:
    """Removed, saved, loaded: what plain transformers would have written."""
    model, batch = tiny_llava(), make_batch()
    model(**batch)
    before = traces(model)
    apply_pre(model)
    model(**batch).loss.backward()
    model.save_pretrained(tmp_path / "with")
    remove_pre(model)
    assert traces(model) == before
    assert model.save_pretrained.__func__ is LlavaForConditionalGeneration.save_pretrained
    model.save_pretrained(tmp_path / "without")
    assert files_in(tmp_path / "without") == files_in(tmp_path / "with") - {f"pre/{FILE}"}


def test_a_state_dict_that_is_given(tmp_path: Path) -> None:
    """As accelerate hands over, by name or position: its heads are written, not the model's own."""
    model = tiny_llava()
    pre = apply_pre(model)
    state = {name: x + 1 for name, x in model.state_dict().items()}
    expected = {name: x + 1 for name, x in model.pre_heads.named_parameters()}
    model.save_pretrained(tmp_path / "named", state_dict=dict(state), max_shard_size="1KB")
    model.save_pretrained(tmp_path / "positional", True, dict(state))
    for name in ("named", "positional"):
        saved = load_heads(tmp_path / name).heads
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[n], x) for n, x in expected.items())
    assert len(list((tmp_path / "named").glob("model-*.safetensors"))) > 2
    without = {name: x for name, x in state.items() if "pre_heads" not in name}
    model.save_pretrained(tmp_path / "without", state_dict=without)
    assert not (tmp_path / "without" / "pre").exists()
    model.save_pretrained(tmp_path / "other rank", is_main_process=False)
    assert not (tmp_path / "other rank" / "pre").exists()
    assert not same_heads(apply_pre(tiny_llava(), from_pretrained=tmp_path / "named"), pre)


def test_save_pretrained_of_the_users(tmp_path: Path) -> None:
    """One that was put on the model comes first, and stays when PRe goes."""
    model = tiny_llava()
    calls = []

    def mine(save_directory: str, **kwargs: Any) -> str:
        calls.append((save_directory, kwargs))
        return "done"

    model.save_pretrained = mine
    apply_pre(model)
    assert model.save_pretrained(str(tmp_path), some="option") == "done"
    assert calls == [(str(tmp_path), {"some": "option"})]
    assert files_in(tmp_path) == {f"pre/{FILE}"}
    remove_pre(model)
    assert model.save_pretrained is mine


def test_a_copy_saves_its_own_heads(tmp_path: Path) -> None:
    model = tiny_llava()
    pre = apply_pre(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.pre_heads["2"].weight_0.zero_()
    clone.save_pretrained(tmp_path)
    saved = load_heads(tmp_path).heads["2.weight_0"]
    assert saved.count_nonzero() == 0 and pre.heads[2].weight_0.count_nonzero() > 0


class Hub:
    """A hub that keeps what it is sent."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return type("Repo", (), {"repo_id": f"someone/{repo_id}"})

    def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> None:
        self.files |= {f"{repo_id}: {operation.path_in_repo}" for operation in operations}

    def upload_folder(
        self, repo_id: str, folder_path: Path, path_in_repo: str, **kwargs: Any
    ) -> None:
        names = files_in(Path(folder_path))
        self.files |= {f"{repo_id}: {path_in_repo}/{name}" for name in names}


@pytest.mark.parametrize("how", ("push_to_hub", "save_pretrained"))
def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **kwargs: hub)
    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})()
    instead: dict[str, Any] = {
        "hf_api": lambda: hub, "create_and_tag_model_card": lambda *a, **k: card,
        "create_repo": hub.create_repo, "create_commit": hub.create_commit,  # before 5.16
    }  # fmt: skip
    for module in (transformers.utils.hub, transformers.modeling_utils):
        for name in instead.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, instead[name])
    model = tiny_llava()
    apply_pre(model)
    if how == "push_to_hub":
        model.push_to_hub("mine")
    else:
        model.save_pretrained(str(tmp_path / "mine"), push_to_hub=True)
    names = ("config.json", "model.safetensors", "README.md", f"pre/{FILE}")
    assert {f"someone/mine: {name}" for name in names} <= hub.files


@pytest.mark.parametrize("inside", ("", "pre"))
def test_from_pretrained_restores_settings_and_heads(tmp_path: Path, inside: str) -> None:
    config = PReConfig(
        layers=(1, 3), weight=0.25, anchor="pre_projector", head_features=7, depth=3,
        activation="silu", loss="mse", normalize="layer", token_fraction=0.5, seed=9,
        value_in_eval=True,
    )  # fmt: skip
    pre = apply_pre(tiny_llava(), config)
    with torch.no_grad():
        pre.heads[3].weight_1.add_(1)
    pre.save(tmp_path / inside)
    again = apply_pre(tiny_llava(1), from_pretrained=str(tmp_path))
    assert again.config == config and same_heads(again, pre)
    third = apply_pre(tiny_llava(), from_pretrained=tmp_path, layers=[1, 3], weight=0.25, depth=3)
    assert third.config == config


@pytest.mark.parametrize(
    "overrides, exception, message",
    (
        ({"weight": -2.0}, ValueError, r"weight: expected a non-negative finite number"),
        ({"layers": 3}, ValueError, r"layers: .* saved with \[2\], .* got \[3\]"),
        ({"layers": (2, 3)}, ValueError, r"layers: .* saved with \[2\], .* got \[2, 3\]"),
        ({"layers": 9}, ValueError, "layers: the decoder has 4 layers"),
        ({"share_head": True}, ValueError, "share_head: .* saved with False, .* got True"),
        ({"head_features": 7}, ValueError, "head_features: .* saved with None, .* got 7"),
        ({"depth": 3}, ValueError, "depth: .* saved with 2, .* got 3"),
        ({"activation": "relu"}, ValueError, "activation: .* saved with 'gelu', .* got 'relu'"),
        (
            {"anchor": "pre_projector"},
            ValueError,
            r"path: .*\(16, 24\).* got .*\(24, 24\).*; anchor='pre_llm' there, 'pre_proj.* here",
        ),
        (
            {"anchor": anchor_of_pixels, "anchor_features": 8},
            ValueError,
            r"path: .*; anchor='pre_llm' there, 'function' here; anchor_features=None there, 8",
        ),
        ({"anchor": anchor_of_pixels}, ValueError, "anchor_features: expected the width A"),
        ({"layer": 2}, TypeError, "layer: not a setting of PRe"),
        ({"config": PReConfig()}, ValueError, "config: expected None with from_pretrained"),
    ),
)
def test_overrides_that_ask_for_other_heads(
    tmp_path: Path, overrides: dict[str, Any], exception: type[Exception], message: str
) -> None:
    apply_pre(tiny_llava()).save(tmp_path)
    model = tiny_llava()
    before = traces(model)
    with pytest.raises(exception, match=message):
        apply_pre(model, from_pretrained=tmp_path, **overrides)
    assert traces(model) == before
    assert apply_pre(model, from_pretrained=tmp_path, layers=None).config.layers == (2,)


def anchor_of_ones(inputs: Any) -> torch.Tensor:
    return torch.ones(int((inputs["input_ids"] == IMAGE_TOKEN).sum()), WIDTH)


@pytest.mark.parametrize(
    "overrides",
    (
        {"weight": 2.0, "token_fraction": 0.5, "seed": 3, "value_in_eval": True},
        {"value_in_forward": True, "loss": "mse", "normalize": "layer"},
        {"level": "global"},
        {"anchor": anchor_of_ones, "anchor_features": WIDTH},
    ),
)
def test_overrides_that_leave_the_heads(tmp_path: Path, overrides: dict[str, Any]) -> None:
    """The step is that of a model that got these settings, and the heads by `load`."""
    old = apply_pre(tiny_llava(), seed=9)
    old.passes = 5
    old.save(tmp_path)
    steps = []
    for again in (True, False):
        model = tiny_llava()
        pre = apply_pre(model, from_pretrained=tmp_path if again else None, **overrides)
        assert {name: getattr(pre.config, name) for name in overrides} == overrides
        if again:
            assert same_heads(pre, old) and pre.passes == 5 and pre.config.layers == (2,)
        else:
            model.pre_heads.load_state_dict(state_of(old).model.pre_heads.state_dict())
            pre.passes = 5
        loss = model(**make_batch()).loss
        loss.backward()
        steps.append((loss.item(), pre.metrics(), gradients(model)["pre_heads.2.weight_0"]))
    assert steps[0][:2] == steps[1][:2] and torch.equal(steps[0][2], steps[1][2])


def test_the_function_of_an_anchor_gives_way(tmp_path: Path) -> None:
    apply_pre(tiny_llava(), anchor=anchor_of_ones, anchor_features=WIDTH).save(tmp_path)
    assert apply_pre(tiny_llava(), from_pretrained=tmp_path, anchor="pre_llm").config == PReConfig(
        layers=(2,)
    )


def test_an_anchor_function_has_to_be_given_again(tmp_path: Path) -> None:
    settings = {"anchor": anchor_of_pixels, "anchor_features": 8}
    pre = apply_pre(tiny_llava(), **settings)
    pre.save(tmp_path)
    with pytest.raises(ValueError, match="anchor: the heads were trained with a function"):
        apply_pre(tiny_llava(), from_pretrained=tmp_path)
    model = tiny_llava()
    again = apply_pre(model, from_pretrained=tmp_path, anchor=anchor_of_pixels)
    assert same_heads(again, pre)
    model(**make_batch()).loss.backward()


def test_heads_of_a_wider_model_leave_no_trace(tmp_path: Path) -> None:
    apply_pre(tiny_llava(), head_features=7).save(tmp_path)
    saved = load_heads(tmp_path)
    model = tiny_llava()
    wrong = saved._replace(config=saved.config | {"head_features": 8})
    save_again(tmp_path, wrong)
    before = traces(model)
    with pytest.raises(ValueError, match=r"heads do not fit: expected .*\(8, 24\).* got .*\(7, 24"):
        apply_pre(model, from_pretrained=tmp_path)
    assert traces(model) == before


def save_again(path: Path, saved: Any) -> None:
    from prereg_kernels.attach.storage import save_heads

    save_heads(path, saved)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"patience": 3}, r"from_pretrained: expected settings of this version .*\['patience'\]"),
        ({"loss": "hinge"}, "loss: expected one of"),
    ),
)
def test_settings_of_another_version(tmp_path: Path, change: Any, message: str) -> None:
    apply_pre(tiny_llava()).save(tmp_path)
    saved = load_heads(tmp_path)
    save_again(tmp_path, saved._replace(config=saved.config | change))
    with pytest.raises(ValueError, match=message):
        apply_pre(tiny_llava(), from_pretrained=tmp_path)


@pytest.mark.parametrize(
    "name, value",
    (
        ("layers", 3), ("share_head", True), ("head_features", 7), ("depth", 3),
        ("activation", "relu"), ("anchor", "pre_projector"), ("level", "global"), ("loss", "mse"),
        ("normalize", "layer"),
    ),
)  # fmt: skip
def test_load_takes_no_heads_that_were_trained_for_something_else(
    tmp_path: Path, name: str, value: Any
) -> None:
    """Unlike `from_pretrained`, which leaves that to the user: it is how a run is resumed."""
    both: dict[str, Any] = {"share_head": {"layers": (2, 3)}, "normalize": {"loss": "mse"}}
    apply_pre(tiny_llava(), **both.get(name, {})).save(tmp_path)
    pre = apply_pre(tiny_llava(), **{name: value}, **both.get(name, {}))
    before = {n: x.clone() for n, x in state_of(pre).parameters().items()}
    with pytest.raises(ValueError, match=rf"path: .*(trained with {name}=|do not fit: )"):
        pre.load(tmp_path)
    assert all(torch.equal(x, before[n]) for n, x in state_of(pre).parameters().items())


def test_load_leaves_the_weight_and_the_rest_as_they_are(tmp_path: Path) -> None:
    old = apply_pre(tiny_llava(), seed=9)
    old.save(tmp_path)
    others = {"weight": 2.0, "token_fraction": 0.5, "seed": 3, "value_in_forward": True}
    pre = apply_pre(tiny_llava(), **others)
    pre.load(tmp_path)
    assert same_heads(pre, old)
    assert {name: getattr(pre.config, name) for name in others} == others


@pytest.mark.parametrize("partition", (lambda x: x[:0], lambda x: x.flatten()[:3]))
def test_heads_that_are_not_whole(tmp_path: Path, partition: Any) -> None:
    """As ZeRO-3 and FSDP1 leave them on the model: nothing is written but what is handed over."""
    model = tiny_llava()
    pre = apply_pre(model)
    whole = {name: p.detach().clone() for name, p in model.pre_heads.named_parameters()}
    pre.save(tmp_path / "before")
    for parameter in pre.heads[2].parameters():
        parameter.data = partition(parameter.data)
    message = "heads: expected whole parameters, .* got .*ZeRO-3"
    for attempt in (pre.save, model.save_pretrained):
        with pytest.raises(ValueError, match=message):
            attempt(tmp_path / "after")
    assert not list((tmp_path / "after").rglob(FILE))
    with pytest.raises(ValueError, match=message):
        pre.load(tmp_path / "before")
    pre.save(tmp_path / "after", whole)
    assert torch.equal(load_heads(tmp_path / "after").heads["2.bias_1"], whole["2.bias_1"])


def test_an_interrupted_restoration_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_pre(model := tiny_llava()).save(tmp_path)
    remove_pre(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PReHead, "fill", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_pre(model, from_pretrained=tmp_path)
    with pytest.raises(ValueError, match="PRe is not attached"):
        remove_pre(model)


def test_nothing_to_restore(tmp_path: Path) -> None:
    expected = f"path: expected a directory with {FILE}, or with pre/{FILE}, got {tmp_path}"
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        apply_pre(tiny_llava(), from_pretrained=tmp_path)


def test_an_interruption_keeps_settings_and_heads_of_one_run(
    tmp_path: Path, fill_disk: Callable[[], None]
) -> None:
    model = tiny_llava()
    old = apply_pre(model, seed=1)
    model.save_pretrained(tmp_path)
    other = tiny_llava()
    apply_pre(other, seed=2)
    fill_disk()
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)
    again = apply_pre(tiny_llava(), from_pretrained=tmp_path)
    assert same_heads(again, old) and again.config.seed == 1
    assert files_in(tmp_path / "pre") == {FILE}
