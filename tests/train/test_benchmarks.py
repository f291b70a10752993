# SPDX-License-Identifier: Apache-2.0
"""What stands between lmms-eval and a model; with lmms-eval: tests/packages/test_lmms_eval.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prereg_kernels.cli.commands import main
from prereg_kernels.train.benchmarks import _answer, evaluate_tasks, make_chat

RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("L", (4, 4))
IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("context", "images", "content"),
    [
        ("What?", [RED], [IMAGE, {"type": "text", "text": "What?"}]),
        ("What?", [RED, BLUE], [IMAGE, IMAGE, {"type": "text", "text": "What?"}]),
        ("What?", [], [{"type": "text", "text": "What?"}]),
        ("Is <image> as <image>", [RED, BLUE],
         [{"type": "text", "text": "Is "}, IMAGE, {"type": "text", "text": " as "}, IMAGE]),
        ("Is <image> as <image>?", [RED], [IMAGE, {"type": "text", "text": "Is  as ?"}]),
    ],
)  # fmt: skip
def test_where_images_are(context: str, images: list[Any], content: list[Any]) -> None:
    messages, pictures = make_chat(context, images)
    assert messages == [{"role": "user", "content": content}]
    assert [(x.mode, x.size) for x in pictures] == [("RGB", (4, 4))] * len(images)


def test_videos_are_an_error() -> None:
    with pytest.raises(ValueError, match="--tasks: expected tasks with images, got a str"):
        make_chat("What?", ["a.mp4"])


class Echo:
    """Answers with what it is asked for."""

    def answer(self, chats: Any, **generation: Any) -> list[str]:
        return [f"{generation} a\n\nb" for _ in chats]


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
         "{'max_new_tokens': 16} a\n\nb"),
        ({"until": ["\n\n"]}, "{'max_new_tokens': 1024} a"),
        ({"until": " a", "num_beams": None}, "{'max_new_tokens': 1024}"),
    ],
)  # fmt: skip
def test_settings_of_a_task(settings: dict[str, Any], answer: str) -> None:
    echo: Any = Echo()
    assert _answer(echo, [([], []), ([], [])], settings) == [answer, answer]


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"num_beams": 3}, {"do_sample": True}])
def test_other_than_greedy_answers_are_an_error(settings: dict[str, Any]) -> None:
    echo: Any = Echo()
    with pytest.raises(ValueError, match=r"--tasks: expected tasks with greedy answers, got \{"):
        _answer(echo, [([], [])], settings)


def test_without_lmms_eval(tmp_path: Path) -> None:
    """As in the tests' environment."""
    with pytest.raises(ValueError, match=r"--tasks: No module named 'lmms_eval'; it needs"):
        evaluate_tasks(tmp_path, ["gqa"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "gqa"), "--tasks: No module named 'lmms_eval'; it needs"),
        (("--tasks", "gqa", "--images", "x"), "--images: expected --data beside it, got --tasks"),
        (("--data", "d.json", "--limit", "3"), "--limit: expected --tasks beside it, got --data"),
        (("--data", "d.json", "--task-files", "x"), "--task-files: expected --tasks beside it"),
    ],
)  # fmt: skip
def test_an_error_is_a_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["prereg", "evaluate", "absent", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("prereg: ")]
    assert message in line


def test_a_package_that_a_setting_asks_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And that is missing, as transformers says of Liger's: one line."""

    def run(*_: Any) -> None:
        raise ImportError("liger-kernel is\nnot available")

    monkeypatch.setattr("prereg_kernels.cli.train.run", run)
    monkeypatch.setattr(sys, "argv", ["prereg", "train", "c.yaml"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "prereg: liger-kernel is not available"
