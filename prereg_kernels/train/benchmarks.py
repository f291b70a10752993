# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of lmms-eval, where it is installed: `prereg evaluate` with `--tasks`.

The questions, their images and the scores are lmms-eval's. The answers are those of the model by
its own processor and chat template, as in `prereg_kernels.train.evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prereg_kernels._util.files import write_whole
from prereg_kernels._util.supported import not_imported
from prereg_kernels.train.collator import open_image
from prereg_kernels.train.evaluate import Chat, Respondent
from prereg_kernels.train.sources.llava import PLACEHOLDER, parts

TASKS = "tasks.json"


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    out: Path,
    *,
    task_files: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, dict[str, float]]:
    """{task: {figure: its value}}, which tasks.json in `out` has too, beside the tasks' versions.

    Args:
        tasks: names that lmms-eval knows.
        task_files: a folder with further tasks, YAML files of lmms-eval's.
        limit: questions of each task; None: all.

    Raises:
        ValueError: lmms-eval is missing or knows no such task, or a task asks for more than greedy
            answers; no model, or no processor.
        OSError: a file cannot be written.
    """
    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        needs = "it needs: pip install lmms-eval"
        raise ValueError(f"--tasks: {not_imported(error, needs)}") from None
    manager = TaskManager("ERROR", include_path=None if task_files is None else str(task_files))
    for task in tasks:
        if task not in manager.all_tasks:
            raise ValueError(f"--tasks: expected tasks that lmms-eval knows, got {task}")
    found = simple_evaluate(
        model=_respondent(Respondent(model, device, dtype), batch_size),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=False,
        bootstrap_iters=0,
    )
    results = {task: _figures(found["results"][task]) for task in found["results"]}
    facts = {"results": results, "versions": found.get("versions", {}), "limit": limit}
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / TASKS, json.dumps(facts, indent=1, default=str) + "\n")
    return results


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers alone, without the name of the filter where there is none."""
    return {
        name.removesuffix(",none"): float(x) for name, x in values.items()
        if isinstance(x, (int, float)) and not isinstance(x, bool) and "stderr" not in name
    }  # fmt: skip


def _respondent(respondent: Respondent, batch_size: int) -> Any:
    """A model as lmms-eval takes it."""
    from lmms_eval.api.model import lmms

    class PreregModel(lmms):
        # Names and arguments are lmms-eval's
        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            answers: dict[int, str] = {}
            groups: dict[str, list[tuple[int, Chat, Mapping[str, Any]]]] = {}
            for number, request in enumerate(requests):
                context, settings, to_visual, place, task, split = request.args
                images = to_visual(self.task_dict[task][split][place])
                chat = make_chat(context, images or ())
                key = f"{bool(chat[1])} {sorted(settings.items())}"
                groups.setdefault(key, []).append((number, chat, settings))
            for group in groups.values():
                for start in range(0, len(group), batch_size):
                    several = group[start : start + batch_size]
                    found = _answer(respondent, [chat for _, chat, _ in several], several[0][2])
                    answers.update(zip((number for number, *_ in several), found, strict=True))
            return [answers[number] for number in range(len(requests))]

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            raise ValueError("--tasks: expected tasks with answers to write, got likelihoods")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise ValueError("--tasks: expected tasks of one question, got one of several rounds")

    return PreregModel()


def make_chat(context: str, images: Sequence[Any]) -> Chat:
    """A question with its images: where its placeholders are, or before it, as LLaVA has them.

    Raises:
        ValueError: what should be an image is none.
    """
    content: list[dict[str, str]] = parts(context)
    if sum(part["type"] == "image" for part in content) != len(images):
        text = context.replace(PLACEHOLDER, "").strip()
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
    pictures = []
    for image in images:
        if not hasattr(image, "convert"):
            raise ValueError(f"--tasks: expected tasks with images, got a {type(image).__name__}")
        pictures.append(open_image(image, None))
    return [{"role": "user", "content": content}], pictures


def _answer(
    respondent: Respondent, chats: Sequence[Chat], settings: Mapping[str, Any]
) -> list[str]:
    is_greedy = not settings.get("temperature") and settings.get("num_beams", 1) in (None, 1)
    if not is_greedy or (settings.get("do_sample") and settings.get("temperature") is None):
        raise ValueError(f"--tasks: expected tasks with greedy answers, got {dict(settings)}")
    answers = respondent.answer(chats, max_new_tokens=int(settings.get("max_new_tokens", 1024)))
    stops = settings.get("until") or ()
    for stop in [stops] if isinstance(stops, str) else stops:
        answers = [answer.split(stop)[0] if stop else answer for answer in answers]
    return answers
