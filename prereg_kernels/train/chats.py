# SPDX-License-Identifier: Apache-2.0
"""A conversation as text by the model's own chat template, and which tokens of it are answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from prereg_kernels.train.sample import BadSampleError, Message

IGNORED = -100
"""The label of a token that no loss is computed of."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


def render(processor: Any, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The text, and where in it the answers are: by the template's generation marks, else by what
    it writes before and after each answer.

    An answer ends with what the template writes to end its turn, blanks aside, whether the marks
    hold that or not. Where it writes no end after the last one, as LLaVA-1.5's, the end-of-sequence
    token is put there.

    Raises:
        BadSampleError: the template refuses the conversation.
        ValueError: the template has no marks, and an answer changes what stands before it.
    """
    try:
        is_marked = _MARKS.search(template_of(processor)) is not None
        text, spans = (_by_marks if is_marked else _by_prefixes)(processor, messages)
    except jinja2.TemplateError as error:
        raise BadSampleError(f"the chat template refuses it: {error}") from None
    end = processor.tokenizer.eos_token
    if end and spans and spans[-1][1] == len(text.rstrip()) and not _is_ended(processor, text):
        text = text[: spans[-1][1]] + end
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def template_of(processor: Any) -> str:
    """The chat template.

    Raises:
        ValueError: there is none.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template["default"]
    if not template:
        raise ValueError("model: expected a processor with a chat template, got one without")
    return str(template)


def _is_ended(processor: Any, text: str) -> bool:
    """Whether the text ends with a special token."""
    specials = [x for x in processor.tokenizer.all_special_tokens if x]
    return text.rstrip().endswith(tuple(specials))


def _by_marks(processor: Any, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    [text], [spans] = render_jinja_template(
        [[dict(message) for message in messages]],
        chat_template=template_of(processor),
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    found = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    turn = 0  # where the one before ends
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        until = _written(processor, messages[: number + 1]).rstrip()
        own = [i for i, (start, _) in enumerate(found) if turn <= start < len(until)]
        if own and text.startswith(until):
            found[own[-1]] = (found[own[-1]][0], len(until))
        turn = len(until)
    return text, found


def _written(processor: Any, messages: Sequence[Message], opened: bool = False) -> str:
    chat = [dict(message) for message in messages]
    text: str = processor.apply_chat_template(chat, add_generation_prompt=opened)
    return text


def _by_prefixes(processor: Any, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    whole, spans = _written(processor, messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _written(processor, messages[:number], opened=True)
        after = _written(processor, messages[: number + 1])
        if not (whole.startswith(after.rstrip()) and after.startswith(before)):
            raise ValueError(
                "model: expected a chat template with {% generation %} marks, or one by which an "
                "answer leaves what stands before it unchanged"
            )
        spans.append((len(before), len(after.rstrip())))
    return whole, spans


Plain = tuple[Sequence[int], Sequence[Span]]
"""A text's ids without those of images, and where in the text each one is."""


def tokenize(processor: Any, texts: Sequence[str]) -> Sequence[Plain | None]:
    """Of each text; None where the tokenizer cannot say where its tokens are."""
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        return [None] * len(texts)
    found = tokenizer(
        list(texts),
        return_offsets_mapping=True,
        add_special_tokens=adds_special(processor, texts[0]),
    )
    return list(zip(found["input_ids"], found["offset_mapping"], strict=True))


def label(
    ids: Sequence[int],
    text: str,
    spans: Sequence[Span],
    plain: Plain | None,
    encode: Callable[[str], Sequence[int]],
) -> list[int]:
    """The labels of a processed sample: its own ids at the answers, `IGNORED` elsewhere.

    The processor has put tokens of its own in the place of each image, so that places in the text
    are not those in `ids`. Behind the last image they are, counted from the end. A token that
    begins with blanks, as Llama's do, is the answer's if what follows them is.

    Args:
        plain: of the text, by `tokenize`.
        encode: the processor's ids of the beginning of the text, images included.

    Raises:
        BadSampleError: tokens lie across the beginning of an answer.
    """
    labels = [IGNORED] * len(ids)
    common = 0
    if plain is not None:
        places, offsets = plain
        most = min(len(places), len(ids))
        while common < most and places[-1 - common] == ids[-1 - common]:
            common += 1
        shift = len(ids) - len(places)
        for place in range(len(places) - common, len(places)):
            start, end = offsets[place]
            blanks = len(text[start:end]) - len(text[start:end].lstrip())
            word = start + blanks * (start + blanks < end)
            if start < end and any(first <= word < last for first, last in spans):
                labels[place + shift] = ids[place + shift]
        reached = offsets[len(places) - common][0] if common else len(text)
    else:
        reached = len(text)
    for first, last in spans:
        if first < reached:  # before an image, or without offsets
            start, end = (len(_prefix(encode, text[:place], ids)) for place in (first, last))
            labels[start:end] = ids[start:end]
    return labels


def adds_special(processor: Any, text: str) -> bool:
    """Whether the tokenizer puts its own first token before a text that may have it already."""
    first = processor.tokenizer.bos_token
    return not (first and text.startswith(first))


def _prefix(encode: Callable[[str], Sequence[int]], text: str, ids: Sequence[int]) -> Sequence[int]:
    for beginning in (text, text.rstrip()):  # the blanks may be of the next token
        found = encode(beginning)
        if list(found) == list(ids[: len(found)]):
            return found
    raise BadSampleError("a token lies across the beginning or the end of an answer")
