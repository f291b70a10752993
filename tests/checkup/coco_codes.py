# SPDX-License-Identifier: Apache-2.0
"""COCO's codes, written and read in other ways than the package's, and a process to do it in."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.mask import decode, frPyObjects, merge


def runs(region: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs down the columns, beginning with background."""
    flat = region.T.ravel()
    ends = [*(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), len(flat)]
    lengths = np.diff([0, *ends]).tolist()
    return [0, *lengths] if flat[0] else lengths


def pack(counts: list[int]) -> str:
    """COCO's string: the difference to the run two before, five bits a character."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


def unpack(text: str) -> list[int]:
    """The numbers of such a string, of 13 characters at most; ValueError where it is none."""
    parts = re.findall("[P-o]{0,12}[0-O]", text)
    if "".join(parts) != text:
        raise ValueError(f"not a code: {text!r}")
    counts: list[int] = []
    for part in parts:
        value = sum((ord(c) - 48) % 32 * 32**i for i, c in enumerate(part))
        if value >= 32 ** len(part) // 2:
            value -= 32 ** len(part)
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


def pixels_of(counts: list[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The region, a pixel at a time; ValueError where the counts are none of that size."""
    flat: list[bool] = []
    for number, count in enumerate(counts):
        if type(count) is not int or not 0 <= count <= size[0] * size[1] - len(flat):
            raise ValueError(f"not a count: {count!r}")
        flat += count * [number % 2 == 1]
    if len(flat) != size[0] * size[1]:
        raise ValueError(f"{len(flat)} pixels")
    return np.array([[flat[x * size[0] + y] for x in range(size[1])] for y in range(size[0])])


def by_pycocotools(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """What COCO's evaluations make of an annotation: `annToMask` of pycocotools' COCO."""
    code = frPyObjects(segmentation, *size)
    return decode(merge(code) if isinstance(code, list) else code).astype(bool)


def in_child(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """("", what it returns) or (the exception's name, its message), from a process of its own.

    The process must not die of it.
    """
    try:
        return _child().submit(_answer, function, *arguments).result()
    except BrokenProcessPool:
        _child.cache_clear()
        raise AssertionError(f"the process died with {arguments}") from None


@cache
def _child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))


def _answer(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    try:
        return "", function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
