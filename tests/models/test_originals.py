"""Models outside of transformers, each by the call that docs/other_models.md has for it.

The stand-ins have the forward of the original code, `tests/models/originals.py`.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from prereg_kernels import Family, remove_pre
from tests.attached import both, compare
from tests.docs.pages import page_of
from tests.models.original_cases import CASES, PROCESSOR, SCENES
from tests.tiny import make_batch, tiny_llava

TITLES = list(dict.fromkeys(case.title for case in CASES.values()))
every_model = pytest.mark.parametrize("name", CASES)


def family_of(name: str, model: Any) -> Family:
    """By the page's call, which its section makes on the model, after those before it on theirs."""
    blocks = page_of("docs/other_models.md").blocks
    namespace: dict[str, Any] = {"processor": PROCESSOR}
    namespace |= {"model": tiny_llava(), "batch": make_batch()}
    exec(blocks[0].text, namespace)
    for title, block in zip(TITLES, blocks[1:], strict=True):
        is_it = title == CASES[name].title
        first = next(case for case in CASES.values() if case.title == title)
        namespace["model"] = model if is_it else first.model()
        exec(block.text, namespace)
        if is_it:
            break
    remove_pre(model)
    family: Family = namespace["family"]
    return family


def check(name: str, scene: str, side: str, checkpointing: bool, **settings: Any) -> None:
    """Every gradient of the model and of the heads, and the figures; nobody is told of anything."""
    case = CASES[name]
    model = case.model()
    batch = case.batch(scene, side, model)
    family = family_of(name, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "PRe")
        ours, expected, metrics, (lm, term) = both(
            batch.inputs, make=lambda: model, mask=batch.visual, checkpointing=checkpointing,
            place=case.place, family=family, **settings,
        )  # fmt: skip
    compare(ours, expected)
    assert metrics["visual_tokens"] == batch.visual.sum()
    assert metrics["pre_loss"] == pytest.approx(term, rel=1e-4, abs=1e-7)
    assert metrics["lm_loss"] == pytest.approx(lm, rel=1e-5)
    assert (term == 0) == (scene == "text only")


@every_model
@pytest.mark.parametrize("checkpointing", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("scene", SCENES)
def test_gradients(name: str, scene: str, side: str, checkpointing: bool) -> None:
    check(name, scene, side, checkpointing)
