# SPDX-License-Identifier: Apache-2.0
"""What cannot be used is left out and named; the rest is what it would be without it."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from prereg_kernels import apply_pre
from prereg_kernels.train import collator as collator_module
from prereg_kernels.train.chats import IGNORED
from prereg_kernels.train.collator import SEEN, Collator, Failed
from prereg_kernels.train.models import load_processor
from prereg_kernels.train.sample import Sample, check_messages
from tests.packages.checkpoint import make_llava, make_qwen
from tests.zoo import CASES


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoProcessor.from_pretrained(make_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images, bad ones, and one outside of the folder."""
    outside = tmp_path_factory.mktemp("images")
    folder = outside / "inside"
    folder.mkdir()
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    for path in (outside / "secret.png", folder / "good.png"):
        Image.fromarray(pixels).save(path)
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    with (folder / "large.png").open("wb") as file:
        file.truncate((1 << 30) + 1)  # of nothing: it takes no place on the disk
    (folder / "thin.png").write_bytes(encoded(Image.new("RGB", (1, 201))))
    (folder / "bomb.png").write_bytes(bomb(60_000, 60_000))
    return folder


def encoded(image: Image.Image, form: str = "png") -> bytes:
    content = io.BytesIO()
    image.save(content, form)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it has so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x))
        for name, x in parts
    )


def sample(root: Path, *images: Any, answer: str = "yes", where: str = "here") -> Sample:
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return Sample(where, check_messages(messages, len(images)), images, root)


def collator(processor: Any, length: int = 500) -> Collator:
    return Collator(processor, length, {processor.image_token_id})


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a if name != SEEN)


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
def test_a_batch_is_what_the_processor_makes(processor: Any, tmp_path: Path, kind: str) -> None:
    """Bitwise, of its own tensors; images of any mode are what Pillow makes RGB of them."""
    if kind != "llava":
        template, processor = processor.chat_template, load_processor(make_qwen(tmp_path))
        mark = "<|vision_start|><|image_pad|><|vision_end|>"
        processor.chat_template = template.replace("<image>", mark).replace("</s>", "<|im_end|>")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 90, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels).convert(mode) for mode in ("RGB", "L", "P", "1", "CMYK")]
    files = [encoded(x) if x.mode != "CMYK" else encoded(x, "tiff") for x in images]
    chosen = [(0,), (1, 2), (3, 4), (0, 4)]
    samples = [
        sample(tmp_path, *(files[i] for i in several), answer="yes " * (number + 1))
        for number, several in enumerate(chosen)
    ]
    batch = collator(processor)(samples)
    expected = processor(
        text=[processor.apply_chat_template(list(x.messages)) for x in samples],
        images=[[images[i].convert("RGB") for i in several] for several in chosen],
        padding=True, padding_side="right", return_tensors="pt",
    )  # fmt: skip
    assert batch.keys() == {*expected.keys(), "labels", SEEN} and batch[SEEN] == (4, [])
    for name, x in expected.items():
        assert batch[name].dtype == x.dtype and batch[name].equal(x), name
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        learned = processor.tokenizer.decode(ids[labels != IGNORED])
        assert learned == "yes " * (row + 1) + processor.tokenizer.eos_token


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.png", "absent.png: no such file"),
        ("cut.png", "cut.png: damaged, or not an image"),
        ("text.png", "text.png: damaged, or not an image"),
        ("empty.png", "empty.png: damaged, or not an image"),
        ("../secret.png", "../secret.png: a name or a link that leads out of the directory"),
        ("link.png", "link.png: a name or a link that leads out of the directory"),
        ("folder.png", "folder.png: no file, but a directory or a device"),
        ("/etc/hostname", "/etc/hostname: a name or a link that leads out of the directory"),
        ("pipe.png", "pipe.png: no file, but a directory or a device"),
        ("device.png", "device.png: a name or a link that leads out of the directory"),
        ("large.png", "large.png: a file of more than 1,073,741,824 bytes"),
        ("thin.png", "thin.png: a side of more than 200 times the other"),
        ("bomb.png", f"bomb.png: more than {Image.MAX_IMAGE_PIXELS:,} pixels"),
        ("a\0b.png", "a\0b.png: a name that no file can have, or links in a circle"),
    ],
)
def test_a_bad_image(processor: Any, root: Path, name: str, reason: str) -> None:
    good = [sample(root, "good.png"), sample(root, "good.png", "good.png", answer="no")]
    bad = sample(root, name, where="d.json:7")
    collate = collator(processor)
    batch = collate([good[0], bad, good[1]])
    assert batch[SEEN] == (3, [("d.json:7", reason)])
    assert equal(batch, collate(good))


@pytest.mark.parametrize("content", [b"", b"no image", bomb(60_000, 60_000)])
def test_bad_bytes(processor: Any, root: Path, content: bytes) -> None:
    """As of a Parquet file or a shard."""
    batch = collator(processor)([sample(root, content), sample(root, "good.png")])
    [(_, reason)] = batch[SEEN][1]
    is_bomb = content.startswith(b"\x89PNG")
    expected = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    assert reason == f"an image: {expected if is_bomb else 'damaged, or not an image'}"


def test_a_stalled_read(processor: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that does not answer is a bad sample after a while; the others are read.

    The pipe, which nobody writes to, stands for one on a file system whose server is gone.
    """
    monkeypatch.setattr("prereg_kernels.train.waiting.READ_SECONDS", 0.2)
    find = collator_module.inside

    def open_it(folder: Path, name: str) -> Path:
        return folder / name if name == "pipe.png" else find(folder, name)

    monkeypatch.setattr(collator_module, "inside", open_it)
    collate, good = collator(processor), sample(root, "good.png")
    start = time.monotonic()
    batch = collate([sample(root, "pipe.png", where="d.json:7"), good])
    assert time.monotonic() - start < 5
    assert batch[SEEN] == (2, [("d.json:7", "pipe.png: no answer within 0.2 s")])
    assert equal(batch, collate([good]))


def test_what_a_processor_refuses(
    processor: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen2-VL's does images of a side 200 times the other: the others stay."""
    process = type(processor).__call__

    def strict(self: Any, *args: Any, images: Any = None, **kwargs: Any) -> Any:
        if images and any(x.width > 100 * x.height for several in images for x in several):
            raise ValueError("absolute aspect ratio must be smaller than 100")
        return process(self, *args, images=images, **kwargs)

    collate = collator(processor)
    good = sample(root, "good.png")
    expected = collate([good])
    monkeypatch.setattr(type(processor), "__call__", strict)
    thin = sample(root, Image.new("RGB", (150, 1)), where="thin")
    batch = collate([thin, good])
    assert batch[SEEN] == (
        2, [("thin", "ValueError: absolute aspect ratio must be smaller than 100")]
    )  # fmt: skip
    assert equal(batch, expected)


def test_a_processor_that_refuses_none_alone_is_an_error(
    processor: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = type(processor).__call__

    def odd(self: Any, *args: Any, text: Any, **kwargs: Any) -> Any:
        if len(text) > 1:
            raise RuntimeError("not two")
        return process(self, *args, text=text, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", odd)
    with pytest.raises(RuntimeError, match="not two"):
        collator(processor)([sample(root, "good.png"), sample(root, "good.png")])


@pytest.mark.parametrize("has_images", [False, True])
def test_none_is_left(processor: Any, root: Path, has_images: bool) -> None:
    """A token without a label, so that other ranks do not wait; with an image where they have."""
    failed = [Failed("d.json:3", "not valid JSON", has_images), Failed("d.json:4", "no answer")]
    batch = collator(processor)(failed)
    assert batch["input_ids"].numel() and (batch["labels"] == IGNORED).all()
    assert batch["labels"].shape == batch["input_ids"].shape
    assert ("pixel_values" in batch) == has_images
    shown = (batch["input_ids"] == processor.image_token_id) & batch["attention_mask"].bool()
    assert not shown.any()
    assert batch[SEEN] == (2, [("d.json:3", "not valid JSON"), ("d.json:4", "no answer")])
    batch = collator(processor)([sample(root, "text.png")])
    assert "pixel_values" in batch
    assert batch[SEEN] == (1, [("here", "text.png: damaged, or not an image")])


def test_a_hidden_image(tmp_path: Path) -> None:
    """Losses, and gradients of the LLM and of the heads, are those without it; the vision encoder
    and the projector get zeros."""
    folder = make_llava(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).train()
    token = model.config.image_token_id
    pre = apply_pre(model)
    samples = [sample(tmp_path, answer="red"), sample(tmp_path, answer="a longer one")]
    plain = Collator(processor, 500, {token})
    hiding = Collator(processor, 500, {token})
    hiding.hides_image = True
    found = []
    for collate in (plain, hiding):
        batch = collate(samples)
        batch.pop(SEEN)
        assert int(pre.count(batch)) == 0
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), named))
    (loss, expected), (hidden_loss, grads) = found
    torch.testing.assert_close(hidden_loss, loss, rtol=1e-6, atol=1e-6)
    more = grads.keys() - expected.keys()
    assert any("vis" in name for name in more)
    assert all(not grads[name].any() for name in more)
    for name, x in expected.items():
        torch.testing.assert_close(grads[name], x, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "qwen3_vl", "llava_next", "internvl", "smolvlm", "gemma3", "paligemma"]
)
def test_models_see_no_hidden_image(name: str) -> None:
    """Tokens of images behind the text, which the attention mask hides, leave the loss as it is."""
    case = CASES[name]()
    text, pictures = (case.batches[scene].inputs for scene in ("text only", "images"))
    ids, behind = text["input_ids"], pictures["input_ids"]
    both = dict(pictures)
    for key, x in pictures.items():
        if isinstance(x, torch.Tensor) and x.shape == behind.shape:
            both[key] = torch.cat([text.get(key, torch.zeros_like(ids)), x], dim=1)
    both["labels"][:, ids.shape[1] :] = IGNORED
    both["attention_mask"] = torch.cat([torch.ones_like(ids), torch.zeros_like(behind)], dim=1)
    expected = case.model(**text).loss
    torch.testing.assert_close(case.model(**both).loss, expected, rtol=1e-6, atol=1e-6)


def test_length(processor: Any, root: Path) -> None:
    """An answer is cut; a sample of which no label or not all of the images are left is bad."""
    whole = sample(root, "good.png", answer="abcdefgh")
    length = collator(processor)([whole])["input_ids"].shape[1]
    text = sample(root, answer="abcdefgh")
    cut = collator(processor, length - 3)([whole])
    full = collator(processor)([whole])
    assert full["labels"].shape[1] == length
    for name in ("input_ids", "labels", "attention_mask"):
        assert cut[name].equal(full[name][:, : length - 3])
    assert cut["pixel_values"].equal(full["pixel_values"])
    assert cut[SEEN] == (1, [])
    before = int((full["labels"][0] != IGNORED).int().argmax())
    none = collator(processor, before)([whole, text])
    assert none[SEEN] == (
        2, [("here", f"no label is left within {before} tokens, of {length}")]
    )  # fmt: skip
    assert none["input_ids"].shape[0] == 1
    images = collator(processor, 8)([whole])
    assert images[SEEN] == (1, [("here", f"its images reach beyond 8 tokens, of {length}")])


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
def test_a_placeholder_in_a_text(
    processor: Any, root: Path, tmp_path: Path, kind: str, count: int
) -> None:
    """A bad sample that is named, where it is the model's; the others are as without it."""
    token = "<image>"
    if kind != "llava":
        template, processor = processor.chat_template, load_processor(make_qwen(tmp_path))
        token, mark = "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"
        processor.chat_template = template.replace("<image>", mark).replace("</s>", "<|im_end|>")
    images = ["good.png"] * count
    good = sample(root, *images, answer="<image> is a tag" if kind != "llava" else "yes")
    bad = sample(root, *images, answer=f"the tag {token} shows it", where="there")
    make = collator(processor)
    reason = f"messages[1]: its text has '{token}', which stands for an image in this model"
    batch = make([good, bad])
    assert batch[SEEN] == (2, [("there", f"{reason}; expected no text with it")])
    assert equal(batch, make([good]))
    assert make.count(bad) is None and make.count(good) is not None
