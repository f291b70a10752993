"""What cannot be used is left out and named; the rest is what it would be without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from prereg_kernels.train.chats import IGNORED
from prereg_kernels.train.collator import SEEN, Collator, Failed
from prereg_kernels.train.sample import Sample, check_messages
from tests.packages.checkpoint import make_llava


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
    return folder


def sample(root: Path, *images: Any, answer: str = "yes", where: str = "here") -> Sample:
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return Sample(where, check_messages(messages, len(images)), images, root)


def collator(processor: Any, length: int = 500) -> Collator:
    return Collator(processor, length, {processor.image_token_id})


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a if name != SEEN)


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


def test_a_huge_image(processor: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    batch = collator(processor)([sample(root, "good.png")])
    assert batch[SEEN] == (1, [("here", "good.png: more than 200 pixels")])


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
    thin = sample(root, Image.new("RGB", (300, 1)), where="thin")
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


def test_none_is_left(processor: Any, root: Path) -> None:
    """A token without a label, so that other ranks do not wait."""
    batch = collator(processor)([Failed("d.json:3", "not valid JSON"), sample(root, "text.png")])
    assert batch["input_ids"].numel() and (batch["labels"] == IGNORED).all()
    assert batch["labels"].shape == batch["input_ids"].shape
    assert "pixel_values" not in batch
    assert batch[SEEN] == (
        2, [("d.json:3", "not valid JSON"), ("here", "text.png: damaged, or not an image")]
    )  # fmt: skip


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
