"""The end of `make train-example`: its model in plain transformers, and whether it has learned.

The first argument is the folder of the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

MARGIN = 0.25  # above the commonest answer, on photographs that training has not seen


def main(folder: Path) -> None:
    """Answer one question, and see that the share of right answers is above the commonest's."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "pre")
    processor = AutoProcessor.from_pretrained(folder / "pre")
    sample = json.loads((folder / "held_out.json").read_text())[0]
    question = sample["conversations"][0]["value"].removeprefix("<image>\n")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    image = Image.open(folder / "images" / sample["image"])
    batch = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=8, do_sample=False)[0]
    answer = processor.decode(written[batch["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{sample['image']}: {question} {answer.strip()}")
    found = json.loads((folder / "pre" / "evaluation.json").read_text())
    if found["exact_match"] < found["commonest"] + MARGIN:
        sys.exit(f"expected {MARGIN:.0%} above the commonest answer, got {found}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
