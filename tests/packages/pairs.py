# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers for DPO, of the questions of `write_messages`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.packages.checkpoint import make_samples


def write_pairs(folder: Path, *, rejected: str) -> Path:
    """A file of them, one a line.

    Args:
        rejected: the key of the worse answer: "rejected", as LLaMA-Factory reads it, with the
            better one beside it; or "rejected_response", as ms-swift does, with that in the chat.
    """
    lines = []
    for sample in make_samples(folder):
        text = "<image>" * len(sample["images"]) + sample["question"]
        asked = {"role": "user", "content": text}
        better = {"role": "assistant", "content": sample["answer"]}
        worse = {"role": "assistant", "content": "no idea"}
        row = {"images": sample["images"]}
        if rejected == "rejected":
            row |= {"messages": [asked], "chosen": better, rejected: worse}
        else:
            row |= {"messages": [asked, better], rejected: worse["content"]}
        lines.append(json.dumps(row))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
