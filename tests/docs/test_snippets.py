# SPDX-License-Identifier: Apache-2.0
"""The Python and the settings in the text do what it says of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from transformers import (
    LlavaForConditionalGeneration,
    TrainingArguments,
    default_data_collator,
)

import prereg_kernels
from prereg_kernels import apply_pre, eager_pre_loss, remove_pre
from prereg_kernels._util.settings_file import load_config
from prereg_kernels.cli.demo import load_sweep
from prereg_kernels.demo.config import RunConfig
from prereg_kernels.train.config import load_config as load_recipe
from prereg_kernels.trainers.attachment import read_settings
from tests.attached import both, compare, eager_term
from tests.docs.commands import chdir, run
from tests.docs.pages import ROOT, Block, is_snippet, pages
from tests.docs.places import in_few_steps
from tests.helpers import relative_error
from tests.models.original_cases import CASES as ORIGINALS
from tests.models.original_cases import PROCESSOR
from tests.tiny import gradients, make_batch, tiny_llava

Namespace = dict[str, Any]

# Why a block of Python or of settings, by the line that it begins with, is not run. The page says
# the same before it: see tests/docs/pages.py.
NOT_RUN = {
    "docs/demo-loop.md, preset: scenes": "takes minutes or hours",
}


def blocks(language: str) -> list[tuple[str, int, Block]]:
    """(page, number, block) of what is run of them."""
    found = []
    for page in pages():
        of_page = [b for b in page.blocks if (b.language or "python" * is_snippet(b)) == language]
        found += [(page.name, n, b) for n, b in enumerate(of_page)]
    return found


def test_what_is_not_run_is_listed_here() -> None:
    found = {
        f"{name}, {block.text.partition('#')[0].strip()}": block.why_not()
        for language in ("python", "yaml")
        for name, _, block in blocks(language)
        if block.why_not()
    }
    parts = {name for name, why in found.items() if why == "a part of a file"}
    assert all(name.startswith("CONTRIBUTING.md, ") for name in parts)
    others = {name for name in found if name.startswith("docs/trainers/")} - parts
    for name in others:  # what stands in for a trainer, or has it, is another test
        assert re.match(r"(needs|a part of a file)\b.*; tests/[\w/]+\.py ", found[name]), name
        [path] = re.findall(r"tests/[\w/]+\.py", found[name])
        assert (ROOT / path).is_file(), name
    assert {n: why for n, why in found.items() if n not in parts | others} == NOT_RUN


def test_every_fenced_block_is_of_a_known_language() -> None:
    """Those of docstrings have none, and may be formulas."""
    for page in pages():
        if page.name.endswith(".md"):
            assert {b.language for b in page.blocks} <= {"sh", "python", "yaml", "json"}, page.name
            for block in page.blocks:
                if block.language == "json":
                    json.loads(block.text)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _, _ in blocks("python")))
def test_snippets(name: str, tmp_path: Path) -> None:
    """A page's in order: what one has made, the next may use."""
    namespace = {} if name.endswith(".md") else dict(vars(prereg_kernels))
    for page, number, block in blocks("python"):
        if page == name and not block.why_not():
            place = tmp_path / str(number)
            place.mkdir()
            CASES.get((name, number), trains_the_heads)(block.text, namespace, place)


def load_tiny(place: Path) -> LlavaForConditionalGeneration:
    """A model as people get theirs: by from_pretrained, and so in eval mode."""
    tiny_llava().save_pretrained(place / "model")
    model = LlavaForConditionalGeneration.from_pretrained(place / "model")
    assert not model.training
    return model


def rows_of_encoder(model: LlavaForConditionalGeneration, batch: Namespace) -> torch.Tensor:
    """(N, A): what enters the projector, by a hook of its own."""
    seen: list[torch.Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def trains_the_heads(text: str, namespace: Namespace, place: Path) -> None:
    """The gradient of `L_LM + 0.5 * L_PRe` by the definition, and the figures."""
    model, batch = load_tiny(place), make_batch()
    namespace |= {"model": model, "batch": batch}
    exec(text, namespace)
    for name, parameter in model.pre_heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    pre, ours, metrics = namespace["pre"], gradients(model), namespace["pre"].metrics()
    model.zero_grad()
    remove_pre(model)
    anchor = partial(rows_of_encoder, model) if pre.config.anchor == "pre_projector" else None
    lm, term = eager_term(model, batch, pre.heads, anchor=anchor)
    (lm + 0.5 * term).backward()
    expected = gradients(model)
    for layer, head in pre.heads.items():
        expected |= {f"pre_heads.{layer}.{n}": p.grad for n, p in head.named_parameters()}
    compare(ours, expected)
    assert namespace["loss"].item() == pytest.approx(lm.item(), rel=1e-5)
    figures = {"pre_loss": term.item(), "lm_loss": lm.item(), "visual_tokens": 8}
    assert metrics == pytest.approx(figures, rel=1e-4)


def is_the_loss_each_time(text: str, namespace: Namespace, place: Path) -> None:
    """Each paragraph computes the same loss and gradients: those of the definition in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (2, 5, 8), "W1": (6, 8), "b1": (6,), "W2": (7, 6), "b2": (7,)}
    leaves = {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}
    anchor = torch.randn(2, 5, 7, generator=generator)
    mask = torch.rand(2, 5, generator=generator) < 0.7
    weights, biases = [leaves["W1"], leaves["W2"]], [leaves["b1"], leaves["b2"]]
    expected = eager_pre_loss(
        leaves["hidden"], anchor, weights, biases, visual_mask=mask, upcast=torch.float64
    )
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()))
    paragraphs = [part for part in text.split("\n\n") if "loss = " in part]
    assert len(paragraphs) == 3
    namespace |= {"anchor": anchor, "visual_mask": mask}
    for paragraph in text.split("\n\n"):
        namespace |= leaves
        exec(paragraph, namespace)
        if paragraph not in paragraphs:
            continue
        loss = namespace["loss"] + 0 * namespace["hidden"].sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
        for ours, true in zip(found, expected_gradients, strict=True):
            assert relative_error(ours, true) < 1e-5, paragraph
        assert namespace["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def trains_by_a_trainer(text: str, namespace: Namespace, place: Path) -> None:
    """A step logs both losses, and writes the heads into its checkpoint."""
    batch = make_batch()
    rows = [{name: x[i] for name, x in batch.items()} for i in range(len(batch["input_ids"]))]
    namespace["model"] = load_tiny(place)
    namespace |= {"samples": rows, "collate": default_data_collator}
    namespace["arguments"] = TrainingArguments(
        str(place / "out"), max_steps=1, logging_steps=1, save_steps=1, use_cpu=True, report_to=[],
        remove_unused_columns=False,
    )  # fmt: skip
    exec(text, namespace)
    namespace["trainer"].train()
    logs = namespace["trainer"].state.log_history[0]
    assert logs.keys() >= {"loss", "lm_loss", "pre_loss"}
    assert (place / "out" / "checkpoint-1" / "pre" / "pre_heads.safetensors").is_file()


def takes_the_heads_up(text: str, namespace: Namespace, place: Path) -> None:
    """Settings and heads, from the directory of the model or from the one of the heads."""
    saved = tiny_llava()
    apply_pre(saved, layers=(1, 3), weight=0.25, seed=4)
    saved.save_pretrained(place / "saved")
    for path in (place / "saved", place / "saved" / "pre"):
        namespace |= {"model": load_tiny(place), "path": str(path)}
        exec(text, namespace)
        pre = namespace["pre"]
        assert pre.config.weight == 0.25 and list(pre.heads) == [1, 3]
        for name, x in load_file(place / "saved" / "pre" / "pre_heads.safetensors").items():
            assert torch.equal(namespace["model"].pre_heads.state_dict()[name], x), name


def takes_a_loss(text: str, namespace: Namespace, place: Path) -> None:
    """A loss of the user's own, whose gradient is that of its definition."""
    namespace |= {"model": load_tiny(place)}
    exec(text, namespace)
    pre, model, batch = namespace["pre"], namespace["model"].train(), make_batch()
    model(**batch).loss.backward()
    ours = gradients(model)
    assert pre.config.loss == "charbonnier(width=0.1)"
    model.zero_grad()
    remove_pre(model)
    options = {"loss": namespace["loss"], "normalize": "layer"}
    lm, term = eager_term(model, batch, pre.heads, **options)
    (lm + 0.5 * term).backward()
    expected = gradients(model)
    for layer, head in pre.heads.items():
        expected |= {f"pre_heads.{layer}.{n}": p.grad for n, p in head.named_parameters()}
    compare(ours, expected)


def measures(text: str, namespace: Namespace, place: Path) -> None:
    """A page of the images of a loader, with a probe of their classes. Training batches will do."""
    kinds = ("cat", "dog")
    loader = [(make_batch(seed=n), [(f"{kind}{n}.jpg", kind) for kind in kinds]) for n in range(12)]
    namespace |= {"model": load_tiny(place), "loader": loader}
    with chdir(place):
        exec(text, namespace)
    assert (place / "out" / "checkup.html").is_file()
    [model] = json.loads((place / "out" / "checkup.json").read_text())["models"]
    assert model["images"] == 24 and "image: class" in model["curves"]
    projected = namespace["model"].model.get_image_features
    with torch.no_grad():
        images = [projected(batch["pixel_values"]).pooler_output for batch, _ in loader]
    norms = torch.cat([x for several in images for x in several]).norm(dim=1)
    assert model["curves"]["median norm"]["value"][0] == pytest.approx(norms.quantile(0.5).item())


def taps(text: str, namespace: Namespace, place: Path) -> None:
    """Both gradients of hidden: the later layers', and half of PRe's by the definition."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 8, generator=generator).requires_grad_()
    index = torch.tensor([1, 4, 7])
    given = {
        "hidden": hidden,
        "anchor": torch.randn(9, 7, generator=generator),
        "weights": [torch.randn(7, 8, generator=generator).requires_grad_()],
        "biases": None,
    }
    namespace |= {**given, "index": index}
    exec(text.replace("...", "lm_loss = hidden.square().sum()", 1), namespace)
    term = eager_pre_loss(**given, visual_index=index, upcast=torch.float64)
    [of_term] = torch.autograd.grad(term, [hidden])
    assert relative_error(hidden.grad, 2 * hidden + 0.5 * of_term) < 1e-5
    assert namespace["pre"].item() == pytest.approx(term.item(), rel=1e-5)


def attaches_to_an_original(title: str) -> Callable[[str, Namespace, Path], None]:
    """The gradients of one batch; tests/models/test_originals.py has the others."""

    def runs(text: str, namespace: Namespace, place: Path) -> None:
        case = next(case for case in ORIGINALS.values() if case.title == title)
        model = case.model()
        namespace |= {"model": model, "processor": PROCESSOR}
        exec(text, namespace)
        batch, family = case.batch("several images", "right", model), namespace["pre"].family
        remove_pre(model)
        ours, expected, metrics, _ = both(
            batch.inputs, make=lambda: model, mask=batch.visual, place=case.place, family=family
        )
        compare(ours, expected)
        assert metrics["visual_tokens"] == batch.visual.sum()

    return runs


def shares_sequences(text: str, namespace: Namespace, place: Path) -> None:
    """With a group of one rank; tests/trainers/test_sequence_parallel.py has larger ones."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        namespace["group"] = dist.group.WORLD
        trains_the_heads(text, namespace, place)
        assert namespace["pre"].sequence_parallel.shard == "contiguous"
    finally:
        dist.destroy_process_group()


# A page's blocks, after its first, are of these models
TITLES = dict.fromkeys(case.title for case in ORIGINALS.values())
CASES: dict[tuple[str, int], Callable[[str, Namespace, Path], None]] = {
    ("README.md", 1): trains_by_a_trainer,
    ("README.md", 2): is_the_loss_each_time,
    ("docs/anchors.md", 0): takes_a_loss,
    ("docs/anchors.md", 1): takes_the_heads_up,
    ("docs/checkup.md", 0): measures,
    ("docs/parallelism.md", 0): shares_sequences,
    ("prereg_kernels/ops/tap.py", 0): taps,
    **{
        ("docs/other_models.md", number): attaches_to_an_original(title)
        for number, title in enumerate(TITLES, 1)
    },
}


def test_calls_in_backticks(tmp_path: Path) -> None:
    """Those of the package, of `model` and of `pre`, whose arguments the text has made."""
    tiny = load_tiny(tmp_path)
    given = {"batch": make_batch(), "path": str(tmp_path / "saved"), "torch": torch}
    apply_pre(tiny)
    tiny.save_pretrained(tmp_path / "saved")
    remove_pre(tiny)
    evaluated: list[str] = []
    for page in pages():
        for span in page.spans if page.name.endswith(".md") else ():
            try:
                tree = ast.parse(span, mode="eval")
            except SyntaxError:
                continue
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            of_us = names & {"apply_pre", "remove_pre", "model", "pre"}
            is_whole = names <= of_us | given.keys() and "..." not in span
            if isinstance(tree.body, ast.Call) and of_us and is_whole:
                evaluated.append(span)
                model = load_tiny(tmp_path)
                namespace = {**vars(prereg_kernels), **given, "model": model}
                namespace["pre"] = None if "apply_pre" in names else apply_pre(model)
                try:
                    eval(span, namespace)
                except Exception as error:
                    raise AssertionError(f"{page.name}: {span}") from error
    assert len(evaluated) > 9


@pytest.mark.parametrize("name, number, block", blocks("yaml"))
def test_settings(name: str, number: int, block: Block, tmp_path: Path) -> None:
    """They are read as they are; a run's train, in a few steps."""
    path = tmp_path / "run.yaml"
    path.write_text(block.text)
    if name.startswith("docs/trainers/"):  # tests/packages trains with them
        written = yaml.safe_load(block.text)
        if "export_dir" in written:  # of a merged model, which has no PRe
            return
        assert read_settings(written.get("pre") or written["model_kwargs"]["pre"])
        return
    if block.why_not():
        assert load_sweep(str(path)).experiment.seeds == yaml.safe_load(block.text)["seeds"]
        return
    if name == "docs/training.md":  # its commands are run in tests/docs/test_commands.py
        recipe, *_ = (other for page, _, other in blocks("yaml") if page == name)
        written = yaml.safe_load(recipe.text) | yaml.safe_load(block.text)  # or a part of one
        path.write_text(yaml.safe_dump(written))
        found = load_recipe(path)
        assert (found.model, found.pre) == (written["model"], written["pre"])
        return
    assert len(load_config(path, RunConfig).stages) == len(yaml.safe_load(block.text)["stages"])
    path.write_text(in_few_steps(block.text))
    run(("prereg", "demo", "--config", "run.yaml", "--out", "out"), tmp_path)
    assert list((tmp_path / "out" / "checkpoints").iterdir())
