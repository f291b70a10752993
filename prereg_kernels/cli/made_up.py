# SPDX-License-Identifier: Apache-2.0
"""A made-up batch on a small model of a kind with random weights: `PRe.check` of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prereg_kernels._util.files import read_json
from prereg_kernels._util.supported import install_torchvision
from prereg_kernels.attach.family import Family
from prereg_kernels.attach.regularizer import apply_pre
from prereg_kernels.attach.resolver import is_pair, resolve
from prereg_kernels.checkup.model_files import CODE, in_words, without_code
from prereg_kernels.cli.reduced import reduced

BYTES = 4e9  # of the weights, at most
SIDE = 224  # of the image
QUESTION = "What is in the image?"


class NotRunError(Exception):
    """There is no batch, or no model to run it; the message is the end of a sentence."""


def check_batch(directory: Path, kind: Any, config: Any) -> tuple[dict[str, str], bool]:
    """What `PRe.check` says, and False where it is an error.

    Args:
        directory: with the model's processor. kind: the model's class. config: the model's.
    """
    facts: dict[str, str] = {}
    try:
        processor = _processor(directory, config)
        model, facts["model"] = _small(kind, config)
        batch = _batch(processor, model, resolve(model).family)
        with _failing("the model itself fails on it"), torch.no_grad():
            model(**batch)
    except NotRunError as reason:
        return facts | {"batch": f"not run, since {reason}"}, True
    facts["batch"], works = _checked(model, batch)
    return facts, works


def processed_batch(directory: Path, config: Any, model: Any) -> dict[str, Any]:
    """What the directory's processor makes of an image and a question, as a step takes it.

    Raises:
        NotRunError: nothing.
    """
    batch = _batch(_processor(directory, config), model, resolve(model).family)
    return {"labels": batch["input_ids"], **batch}


def _checked(model: Any, batch: dict[str, Any]) -> tuple[str, bool]:
    """What `PRe.check` says, and whether it is content."""
    family = resolve(model).family
    entry, count = family.entry_of(model), len(family.layers_of(model))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            pre = apply_pre(model, layers=max(1, count // 2, 0 if entry is None else entry + 1))
            pre.check(batch)
        except Exception as error:
            return f"error: {in_words(error)}", False
    ours = [str(warning.message) for warning in told if str(warning.message).startswith("PRe: ")]
    positions = batch["input_ids"].numel()
    seen = f"{int(pre.count(batch))} visual tokens of {positions} positions"
    if ours:
        return f"{seen}; warning: {' '.join(ours)}", True
    if entry:
        return (
            f"checked in part: {seen} have features where they enter layer {entry + 1}, and layers "
            "before it change all rows, so the others are not compared"
        ), True
    return f"checked: {seen}, features where PRe expects them", True


def _processor(directory: Path, config: Any) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    files = sorted(directory.glob("*config.json"))
    files = [path for path in files if path.name != "config.json"]
    if not files:
        raise NotRunError(f"{directory.name} has no processor")
    for path in files:
        named: list[str] = []
        with _failing(f"{path.name} cannot be read"):
            without_code(read_json(path), named, CODE)
        if named:
            raise NotRunError(f"{path.name} names code to run, at {named[0]}")
    with _failing("transformers cannot load the processor"):
        try:
            processor = AutoProcessor.from_pretrained(
                directory, config=config, local_files_only=True, trust_remote_code=False
            )
        except ImportError as error:
            if "torchvision" not in str(error).lower():
                raise
            raise NotRunError(
                "AutoProcessor needs torchvision for it, as wherever a model takes videos; "
                + install_torchvision()
            ) from error
    if not isinstance(processor, ProcessorMixin):
        raise NotRunError(f"{directory.name} has a {type(processor).__name__} and no processor")
    return processor


def _small(kind: Any, config: Any) -> tuple[Any, str]:
    """The model at reduced size, in eval mode; and what it is."""
    with _failing("the model is not to be had at reduced size"):
        small = reduced(config)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in kind(small).parameters())
        dtype = torch.float32 if 4 * parameters <= BYTES / 2 else torch.bfloat16
        if parameters * dtype.itemsize > BYTES:
            raise NotRunError(
                f"even at reduced size the model has {parameters:,} parameters, more than "
                f"{BYTES / 1e9:.0f} GB in {dtype}"
            )
        with torch.random.fork_rng(devices=[]), _default(dtype):
            torch.manual_seed(0)
            model = kind(small).eval()
            _fill(model)
    layers = len(resolve(model).family.layers_of(model))
    words = f"at reduced size, {layers} layers, {parameters:,} random parameters, {dtype}"
    return model, words


@torch.no_grad()
def _fill(model: Any) -> None:
    """Random numbers where a fresh model has zeros, or memory as it was, and a trained one not."""
    for parameter in model.parameters():
        largest = torch.linalg.vector_norm(parameter, float("inf"))
        if not largest or not largest.isfinite():
            parameter.normal_(std=0.02)


def _batch(processor: Any, model: Any, family: Family) -> dict[str, Any]:
    """Of an image of noise and a question; the first prompt with a visual token in it."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    failed, tried = "", 0
    for prompt in _prompts(processor):
        try:
            made = processor(text=[prompt], images=[Image.fromarray(noise)], return_tensors="pt")
            batch = {name: _cast(value, model.dtype) for name, value in made.items()}
            tried += 1
            if bool(family.marked(model, batch).any()):
                return batch | ({"labels": batch["input_ids"]} if is_pair(model.config) else {})
        except Exception as error:
            failed = failed or in_words(error)
    if tried:
        raise NotRunError(
            f"{type(processor).__name__} makes no visual token "
            f"({family.visual_tokens or 'by the mask'}) of an image"
        )
    raise NotRunError(f"{type(processor).__name__} fails: {failed}")


def _prompts(processor: Any) -> Iterator[str]:
    """By the chat template, with the image's token, and without."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    with contextlib.suppress(Exception):  # there are processors without a template
        messages = [{"role": "user", "content": content}]
        yield processor.apply_chat_template(messages, add_generation_prompt=True)
    if getattr(processor, "image_token", None) is not None:
        yield f"{processor.image_token} {QUESTION}"
    yield QUESTION


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """NotRunError in place of any error in here."""
    try:
        yield
    except NotRunError:
        raise
    except Exception as error:
        raise NotRunError(f"{what}: {in_words(error)}") from error
