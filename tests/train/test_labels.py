# SPDX-License-Identifier: Apache-2.0
"""Labels: the answers, by hand, of twenty conversations under each kind of template."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoProcessor, LlamaTokenizer, PreTrainedTokenizerFast

from prereg_kernels.train.assemble import VICUNA, assemble
from prereg_kernels.train.chats import IGNORED
from prereg_kernels.train.collator import SEEN, Collator
from prereg_kernels.train.models import load_processor
from prereg_kernels.train.sample import Sample, check_messages
from tests.packages import checkpoint
from tests.packages.checkpoint import SPECIAL, make_llava
from tests.train.models import make_clip, make_llama, make_llama3, make_qwen

EXAMPLES = Path(__file__).parents[2] / "examples"
ANSWERS = ("Red.", "No, it is blue", "ä tree\nand a dog", " ", "<b>7</b>", "Yes")
QUESTIONS = ("What?", "Is it\nred?", "assistant: no?", "and ASSISTANT: this", "7")


def conversation(number: int) -> tuple[list[dict[str, Any]], list[str], int]:
    """(messages, answers, images): of one to four turns, images in the first or in several."""
    turns, images = 1 + number % 4, (1, 0, 2, 1, 3)[number % 5]
    messages: list[dict[str, Any]] = []
    if number % 7 == 0:
        messages.append({"role": "system", "content": "Be kind."})
    answers = []
    for turn in range(turns):
        here = images if turn == 0 else 0
        if number % 5 == 4:  # one a turn, so that an answer stands before an image
            here = 1 if turn < images else 0
        question = QUESTIONS[(number + turn) % len(QUESTIONS)]
        answer = ANSWERS[(number * 3 + turn) % len(ANSWERS)]
        parts = [{"type": "image"}] * here + [{"type": "text", "text": question}]
        messages += [
            {"role": "user", "content": parts}, {"role": "assistant", "content": answer},
        ]  # fmt: skip
        answers.append(answer)
    count = sum(p["type"] == "image" for m in messages if m["role"] == "user" for p in m["content"])
    return messages, answers, count


CHATS = [conversation(number) for number in range(20)]
# Before each answer, and what its labels end with, as the templates' texts say.
FORMS = {
    "vicuna": (" ASSISTANT:", " {}</s>"),
    "chatml": ("<|im_start|>assistant\n", "{}<|im_end|>"),
    "plain": ("assistant: ", "{}</s>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "{}<|eot_id|>"),
    "qwen2.5-vl": ("<|im_start|>assistant\n", "{}<|im_end|>"),
}
QWEN_CHAT = re.search(  # the example's, with all models that it trains
    r"QWEN_CHAT = (\(.*?\n\))\n", (EXAMPLES / "photographs.py").read_text(), re.S
)


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    place = tmp_path_factory.mktemp("models")
    clip = make_clip(place / "clip")
    assemble(str(clip), str(make_llama(place / "llama")), place / "vicuna")
    assemble(str(clip), str(make_qwen(place / "qwen")), place / "chatml")
    make_llava(place / "plain")
    assemble(str(clip), str(make_llama3(place / "llama3_alone")), place / "llama3")
    checkpoint.make_qwen(place / "qwen2.5-vl")
    found = {name: load_processor(place / name) for name in FORMS}
    assert QWEN_CHAT is not None
    found["qwen2.5-vl"].chat_template = ast.literal_eval(QWEN_CHAT[1])
    assert "generation" in VICUNA
    assert [name for name, p in found.items() if "generation %}" in p.chat_template] == ["vicuna"]
    return found


def by_hand(
    processor: Any, name: str, messages: Sequence[Any], answers: Sequence[str]
) -> tuple[list[int], list[int]]:
    """(ids, labels): the text cut by hand at each answer, a token a byte; four of each image."""
    before, form = FORMS[name]
    chat = [dict(m) for m in check_messages(messages, sum_images(messages))]
    text = processor.apply_chat_template(chat)
    ids: list[int] = []
    labels: list[int] = []

    def add(piece: str, is_answer: bool) -> None:
        tokens = processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids.extend(tokens)
        labels.extend(tokens if is_answer else [IGNORED] * len(tokens))

    for answer in answers:
        written = form.format(answer.strip() if name == "llama3" else answer)
        # The last of them that this answer follows: a question may hold the words as well
        place = text.index(before + written) + len(before)
        add(text[:place].replace(processor.image_token, 4 * processor.image_token), False)
        add(written, True)
        text = text[place + len(written) :]
    add(text.replace(processor.image_token, 4 * processor.image_token), False)
    return ids, labels


def sum_images(messages: Sequence[Any]) -> int:
    parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    return sum(part["type"] == "image" for part in parts)


@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("name", FORMS)
def test_labels(processors: Mapping[str, Any], name: str, number: int) -> None:
    processor = processors[name]
    messages, answers, images = CHATS[number]
    collate = Collator(processor, 1000, {processor.image_token_id})
    pictures = [Image.new("RGB", (16, 16), "red")] * images
    batch = collate([Sample("here", check_messages(messages, images), pictures)])
    assert batch[SEEN] == (1, [])
    ids, labels = by_hand(processor, name, messages, answers)
    assert batch["input_ids"][0].tolist() == ids
    assert batch["labels"][0].tolist() == labels


def test_a_batch_is_its_samples(processors: Mapping[str, Any]) -> None:
    """Padded on the right; no label at the padding."""
    processor = processors["chatml"]
    collate = Collator(processor, 1000, {processor.image_token_id})
    samples = [
        Sample(str(n), check_messages(CHATS[n][0], CHATS[n][2]),
               [Image.new("RGB", (16, 16))] * CHATS[n][2])
        for n in range(20) if CHATS[n][2]
    ]  # fmt: skip
    whole = collate(samples)
    for row, sample in enumerate(samples):
        alone = collate([sample])
        length = alone["input_ids"].shape[1]
        assert whole["input_ids"][row, :length].equal(alone["input_ids"][0])
        assert whole["labels"][row, :length].equal(alone["labels"][0])
        assert (whole["labels"][row, length:] == IGNORED).all()
        assert not whole["attention_mask"][row, length:].any()


@pytest.mark.parametrize("number", range(20))
def test_tokens_that_begin_with_a_blank(tmp_path: Path, number: int) -> None:
    """As Llama's: a blank is a part of the word after it, and a first one is put before a text."""
    make_llava(tmp_path)
    processor: Any = AutoProcessor.from_pretrained(tmp_path)
    texts = [text for row in (*QUESTIONS, *ANSWERS) for text in (row, f"user: {row} assistant: ")]
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    words.train_from_iterator(texts, trainer)
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    messages, answers, images = CHATS[number]
    collate = Collator(processor, 1000, {processor.image_token_id})
    pictures = [Image.new("RGB", (16, 16))] * images
    batch = collate([Sample("here", check_messages(messages, images), pictures)])
    assert batch[SEEN] == (1, [])
    labels = batch["labels"][0]
    begins = (labels[1:] != IGNORED) & (labels[:-1] == IGNORED)
    parts = torch.tensor_split(labels, (begins.nonzero().flatten() + 1).tolist())[1:]
    found = [processor.tokenizer.decode(part[part != IGNORED]) for part in parts]
    assert [x.strip() for x in found] == [f"{answer}</s>".strip() for answer in answers]


WORDS = ("▁Yes", "▁USER:", "▁ASSISTANT:", "▁what?", "▁A", "▁cat")
# As LLaVA-1.5's: the marks hold the blank behind an answer, and the one before it is outside.
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% if m['role'] == 'assistant' %}{% for p in m['content'] %}"
    "{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# As LLaVA-OneVision's: the turn's end is outside of the marks.
ONE_VISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% elif m['role'] != 'assistant' %}{{ p['text'] }}"
    "{% else %}{% generation %}{{ p['text'] }}{% endgeneration %}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words_tokenizer() -> Any:
    """Llama's, with the merges of these words, blanks before them and all."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(letter) for letter in range(33, 127)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for length in range(1, len(word)):
            if (pair := (word[:length], word[length])) not in merges:
                merges.append(pair)
                pieces.append(word[: length + 1])
    special = ["<image>", "<|im_start|>", "<|im_end|>"]
    tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": special, "pad_token": "<unk>"})
    return tokenizer


@pytest.mark.parametrize("has_marks", (True, False))
@pytest.mark.parametrize("later", (False, True), ids=("first image", "later image"))
@pytest.mark.parametrize("template, end", ((LLAVA, ""), (ONE_VISION, "<|im_end|>")))
def test_marks_of_models_own_templates(
    tmp_path: Path, template: str, end: str, later: bool, has_marks: bool
) -> None:
    """All of an answer, from the blank of its first token to its turn's end, and nothing else."""
    make_llava(tmp_path)
    processor: Any = AutoProcessor.from_pretrained(tmp_path)
    processor.tokenizer = tokenizer = words_tokenizer()
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    processor.chat_template = template
    if not has_marks:
        processor.chat_template = re.sub(r"{% (end)?generation %}", "", template)
    asked: list[dict[str, Any]] = [{"type": "text", "text": "what?"}]
    shown = [{"type": "image"}, *asked]
    messages = []
    for number, answer in enumerate(("Yes", "A cat")):
        messages.append({"role": "user", "content": shown if later == bool(number) else asked})
        messages.append({"role": "assistant", "content": answer})
    collate = Collator(processor, 1000, {processor.image_token_id})
    batch = collate([Sample("x", check_messages(messages, 1), [Image.new("RGB", (16, 16))])])
    assert batch[SEEN] == (1, [])
    labels = [x for x in batch["labels"][0].tolist() if x != IGNORED]
    # Behind a line's end a word has no blank
    first, second = (["▁Yes"], ["▁A", "▁cat"]) if not end else ([*"Yes"], ["A", "▁cat"])
    expected = [*first, *([end] if end else []), *second, end or "</s>"]
    assert tokenizer.convert_ids_to_tokens(labels) == expected
