# SPDX-License-Identifier: Apache-2.0
"""Packed rows: the losses and gradients of the samples one by one, by the definition."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, MptConfig, OPTConfig

from prereg_kernels.train import packing
from prereg_kernels.train.chats import IGNORED
from prereg_kernels.train.collator import SEEN, Collator
from prereg_kernels.train.config import load_config
from prereg_kernels.train.facts import FACTS, CountingCollator, Facts
from prereg_kernels.train.order import Mixture
from prereg_kernels.train.packing import PackedSampler, fill, fit, packed, prepare_packing
from prereg_kernels.train.rows import pack
from prereg_kernels.train.run import train
from tests.packages.checkpoint import make_llava
from tests.packages.definition import errors, gradients
from tests.packages.run import Run
from tests.train.launching import PREREG, start
from tests.train.places import make_place, metrics, settings, write
from tests.train.test_collator import sample
from tests.train.test_order import Numbers
from tests.zoo import CASES

LENGTH = 200


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def test_rows_are_full_and_whole() -> None:
    tokens = np.random.default_rng(0).integers(1, 120, 2500)
    rows = fill(tokens, LENGTH)
    assert sorted(i for row in rows for i in row) == list(range(2500))
    sizes = [int(tokens[row].sum()) for row in rows]
    assert max(sizes) <= LENGTH
    assert len(rows) <= 1.03 * math.ceil(tokens.sum() / LENGTH)
    assert fill(np.array([LENGTH + 5, 1]), LENGTH) == [[0], [1]]  # one that is too long by itself


@pytest.mark.parametrize("count", [1, 5, 7, 9, 24])
def test_other_numbers_of_rows(count: int) -> None:
    rows = fit([[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10], [11], [12]], count)
    assert len(rows) == count
    assert {i for row in rows for i in row} == set(range(13))
    if count <= 13:
        assert sum(map(len, rows)) == 13


def make_sampler(seed: int = 0, weight: float = 1.0) -> PackedSampler:
    mixture = Mixture([Numbers("a", 61), Numbers("b", 100, 1)])
    return PackedSampler(mixture, (1.0, weight), 4, seed, mixture.lengths // 4, LENGTH)


def test_an_epoch_of_rows() -> None:
    """Every sample once; as many rows in each epoch, of a kind in each unit; by seed and epoch."""
    sampler = make_sampler()
    images = sampler._mixture.images
    for epoch in range(4):
        rows = sampler.rows(epoch)
        assert len(rows) == len(sampler) and len(rows) % 4 == 0
        assert sorted(i for row in rows for i in row) == list(range(161))
        for start_of in range(0, len(rows), 4):
            kinds = {bool(images[i]) for row in rows[start_of : start_of + 4] for i in row}
            assert len(kinds) == 1
    assert make_sampler().rows(1) == sampler.rows(1) != sampler.rows(2)
    assert make_sampler(1).rows(1) != sampler.rows(1)
    sampler.set_epoch(1)
    assert list(sampler) == sampler.rows(1)
    assert {len(make_sampler(weight=0.5).rows(epoch)) for epoch in range(4)} == {
        len(make_sampler(weight=0.5))
    }


def test_batches_of_a_block() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 300)
    images = np.arange(300) % 4
    by = packing.Estimate(0.25, 10, 90)
    batches = packed(lengths, images, np.random.default_rng(0), 2, by, LENGTH)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    tokens = np.minimum(np.ceil(0.25 * lengths + 10 * images), 90)
    assert max(tokens[batch].sum() for batch in batches) <= 2 * LENGTH
    assert all(len({images[i] > 0 for i in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("is_flat", [False, True])
def test_what_a_row_holds(is_flat: bool) -> None:
    """By hand: three samples of 3, 2 and 2 tokens in rows of 5, or in one."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0], [3, 4, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]]),
        "labels": torch.tensor([[IGNORED, 6, 7], [8, 9, IGNORED], [IGNORED, 4, IGNORED]]),
        "pixel_values": torch.arange(4.0),
    }
    found = {n: x.tolist() for n, x in pack(batch, 5, 1, is_flat=is_flat).items()}
    n = IGNORED
    if is_flat:
        assert found == {
            "input_ids": [[5, 6, 7, 8, 9, 3, 4]], "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
            "labels": [[n, 6, 7, n, 9, n, 4]], "pixel_values": [0, 1, 2, 3],
        }  # fmt: skip
    else:
        assert found == {
            "input_ids": [[5, 6, 7, 8, 9], [3, 4, 1, 1, 1]],
            "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
            "labels": [[n, 6, 7, n, 9], [n, 4, n, n, n]], "pixel_values": [0, 1, 2, 3],
        }  # fmt: skip


def unpacked(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The samples of a recorded batch, one by one; those that are padding have no label."""
    found, image = [], 0
    for ids, places, labels in zip(
        batch["input_ids"], batch["position_ids"], batch["labels"], strict=True
    ):
        starts = [*(places == 0).nonzero()[:, 0].tolist(), len(ids)]
        for first, last in pairwise(starts):
            own = {"input_ids": ids[None, first:last], "labels": labels[None, first:last]}
            count = int((own["input_ids"] == 4).sum()) // 4  # tokens of an image
            if count:
                own["pixel_values"] = batch["pixel_values"][image : image + count]
                image += count
            own["attention_mask"] = torch.ones_like(own["input_ids"])
            if (own["labels"] != IGNORED).any():
                found.append(own)
    assert image == len(batch.get("pixel_values", ()))
    return found


def test_a_packed_step_s_gradients_are_the_definition_s(place: Path, tmp_path: Path) -> None:
    """Of two micro-batches, of several layers: those of the samples one by one."""
    out = tmp_path / "out"
    path = write(tmp_path / "c.yaml", settings(
        place, out, pre={"layers": [2, 3], "weight": 0.7}, packing_length=LENGTH, max_length=150,
        stages__0__max_steps=1, stages__1__max_steps=2, stages__1__gradient_accumulation_steps=2,
        stages__1__trainable=["tower", "projector", "llm"],
        trainer__per_device_train_batch_size=2,
    ))  # fmt: skip
    done = start(*PREREG, "train", str(path), cwd=tmp_path, RECORDED=str(tmp_path / "recorded"))
    assert done.returncode == 0, done.stderr[-4000:]
    run = Run(tmp_path / "recorded", out, done.stdout)
    for number in range(2):
        step = run.step(number)
        assert len(step["batches"]) == 2
        assert all("attention_mask" not in batch for batch in step["batches"])
        samples = [sample for batch in step["batches"] for sample in unpacked(batch)]
        assert len(samples) > sum(len(batch["input_ids"]) for batch in step["batches"]) + 2
        expected = gradients(out / "stages/align/model", run, {**step, "batches": samples}, 0.7)
        assert max(errors(step["gradients"], expected).values()) < 1e-5


def test_an_epoch_in_rows(place: Path, tmp_path: Path) -> None:
    """All samples are seen in fewer steps; none is bad."""
    out = run_packed(place, tmp_path / "out", 2)
    assert 2 <= len(metrics(out, "tune")) <= 5  # of 12 batches of two samples
    assert not (out / "bad_samples.jsonl").exists()
    checkpoint = max((out / "stages/tune").glob("checkpoint-*"))
    assert json.loads((checkpoint / "bad_samples.json").read_text()) == {"seen": 24, "bad": 0}


def run_packed(place: Path, out: Path, rows: int) -> Path:
    return train(load_config(write(out.parent / "c.yaml", packed_settings(place, out, rows))))


def packed_settings(place: Path, out: Path, rows: int) -> dict[str, Any]:
    return settings(
        place, out, packing_length=LENGTH, max_length=150, stages__0__max_steps=1,
        trainer__per_device_train_batch_size=rows, max_bad=0,
    )  # fmt: skip


@pytest.mark.parametrize("text_config", [MptConfig, OPTConfig])
def test_models_that_cannot(tmp_path: Path, text_config: Any) -> None:
    """MPT takes no positions, and OPT has its own: their samples would see each other."""
    folder = make_llava(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    collator = Collator(processor, 500, {processor.image_token_id})
    prepare_packing(model, collator, LENGTH)
    assert collator.row_length == LENGTH and not collator.is_flat
    sizes = {
        MptConfig: {"d_model": 48, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
        OPTConfig: {"hidden_size": 48, "ffn_dim": 96, "num_attention_heads": 4,
                    "num_hidden_layers": 2, "word_embed_proj_dim": 48},
    }[text_config]  # fmt: skip
    config = model.config
    config.text_config = text_config(
        vocab_size=config.text_config.vocab_size, initializer_range=0.5, **sizes
    )
    other = type(model)(config)
    with pytest.raises(ValueError, match=f"llava with {config.text_config.model_type} lets packed"):
        prepare_packing(other, collator, LENGTH)


def test_models_of_three_positions(tmp_path: Path) -> None:
    model = CASES["qwen2_5_vl"]().model
    processor = AutoProcessor.from_pretrained(make_llava(tmp_path / "model"))
    with pytest.raises(ValueError, match="packing_length: qwen2_5_vl has positions in three dim"):
        prepare_packing(model, Collator(processor, 500, ()), LENGTH)


@pytest.mark.parametrize(
    ("value", "message"), [(0, "at least 1"), (100, "at least max_length, 2048")]
)
def test_a_wrong_length(tmp_path: Path, value: int, message: str) -> None:
    path = write(tmp_path / "c.yaml", {"model": "m", "out": "o", "data": [{"path": "x"}]})
    with pytest.raises(ValueError, match=f"packing_length: expected {message}"):
        load_config(path, ["--packing_length", str(value)])


def test_text_alone_of_a_stream_on_several_ranks(place: Path) -> None:
    processor = AutoProcessor.from_pretrained(place / "model")
    collator = Collator(processor, 150, {processor.image_token_id})
    collator.row_length, collator.hides_image = LENGTH, True
    with pytest.raises(ValueError, match="packing_length: expected images in each sample of a"):
        collator([sample(place)])
    assert collator([[sample(place, "images/0_0.png")]])[SEEN] == (1, [])


@pytest.mark.parametrize("is_flat", [False, True])
def test_facts_of_rows_are_those_of_their_samples(place: Path, is_flat: bool) -> None:
    """Without the padding behind a shorter row; a bad sample counts nothing."""
    processor = AutoProcessor.from_pretrained(place / "model")
    ids = {processor.image_token_id}
    texts = ["yes " * 12, "no", "two", "it is a cat"]
    samples = [
        sample(place, *(["images/0_0.png"] * (1 + number % 2)), answer=text, where=f"d:{number}")
        for number, text in enumerate(texts)
    ]
    bad = sample(place, "images/absent.png", where="d:4")
    apart = [CountingCollator(Collator(processor, 150, ids), ids)([x])[FACTS] for x in samples]
    collator = Collator(processor, 150, ids)
    collator.row_length, collator.is_flat = 150, is_flat
    batch = CountingCollator(collator, ids)([samples[:2], [samples[2], bad, samples[3]]])
    found = batch.pop(FACTS)
    sums = [sum(each[i] for each in apart) for i in range(1, 6)]
    assert found == Facts(("d:0", "d:1", "d:2", "d:3"), *sums)
    assert found.images == 6 and found.visual_tokens == 24
    assert (batch["input_ids"].numel() > found.tokens) == (not is_flat)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "pixel_values", SEEN}
