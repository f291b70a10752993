# SPDX-License-Identifier: Apache-2.0
"""What `prereg train` asks of the processes, and of their engine, before the first step."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainingArguments
from transformers.training_args import ParallelMode

from prereg_kernels.train.config import load_config
from prereg_kernels.train.engines import check_spread
from prereg_kernels.train.models import load_model
from prereg_kernels.train.run import train
from prereg_kernels.train.trainer import RecipeTrainer
from tests.train.places import make_place, metrics, settings, write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def run(place: Path, out: Path, **changes: Any) -> Path:
    path = write(out.parent / f"{out.name}.yaml", settings(place, out, **changes))
    return train(load_config(path))


def test_one_process_of_several_gpus(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would take DataParallel: the first stage refuses it, with PRe or without.

    It does so for a `device_map` too, unless that has spread the model over several devices.
    """
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(two_gpus))
    short = {"stages__0__max_steps": 1, "stages__1__max_steps": 1}
    maps: list[Any] = [{}, {"device_map": None}, {"device_map": {"": "cpu"}}]
    for number, arguments in enumerate(maps):
        out = tmp_path / str(number)
        with pytest.raises(ValueError, match="of 2 GPUs: torchrun --nproc-per-node 2 -m prereg_k"):
            run(place, out, model_arguments=arguments, **short)
        assert not list(out.glob("stages/*/*"))

    def spread(*args: Any, **kwargs: Any) -> Any:
        model: Any = load_model(*args, **kwargs)
        model.hf_device_map = {"model.vision_tower": "cuda:0", "model.language_model": "cuda:1"}
        return model

    monkeypatch.setattr("prereg_kernels.train.run.load_model", spread)
    out = run(place, tmp_path / "spread", model_arguments=maps[-1], **short)
    assert [line["step"] for stage in ("align", "tune") for line in metrics(out, stage)] == [1, 1]


@pytest.mark.parametrize(
    ("places", "gpus"),
    [(None, 2), ({"": "cpu"}, 2), ({"": "cuda:0"}, 2), ({"a": "cuda:0", "b": "cpu"}, 2),
     ({"": "cuda:1"}, 1), ({"a": 0, "b": 1}, 1)],
)  # fmt: skip
def test_where_a_device_map_has_put_a_model(places: Any, gpus: int) -> None:
    """On the first GPU alone is no spread: 2 are left, which is an error."""
    arguments: Any = SimpleNamespace(n_gpu=2, _n_gpu=2, device=torch.device("cuda:0"))
    model = torch.nn.Linear(1, 1)
    if places is not None:
        model.hf_device_map = places
    if gpus == 1:
        check_spread(arguments, model)
    else:
        with pytest.raises(ValueError, match=r"a process for each of 2 GPUs: .*; got one process"):
            check_spread(arguments, model)
    assert arguments._n_gpu == gpus


def two_gpus(arguments: Any) -> int:
    """`n_gpu` where a process sees two; Trainer puts 1 in its place for a model over several."""
    return 1 if vars(arguments).get("_n_gpu") == 1 else 2


@pytest.mark.parametrize(
    ("trainable", "leaves_out"),
    [(["projector"], True), (["tower", "llm"], True), (["llm"], False)],
)
@pytest.mark.parametrize("has_text_alone", [True, False])
def test_steps_that_leave_parameters_out(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainable: list[str],
    leaves_out: bool,
    has_text_alone: bool,
) -> None:
    """Those of text alone, where more than the LLM trains: DDP would wait for them."""
    records = json.loads((place / "data.json").read_text())
    data = tmp_path / "data.json"
    data.write_text(json.dumps([x for x in records if has_text_alone or x["image"]]))
    stage = {"name": "tune", "trainable": trainable, "max_steps": 1}
    changes: dict[str, Any] = {
        "data__0__path": str(data), "stages": [stage], "pre": None,
        "trainer__ddp_find_unused_parameters": False, "trainer__per_device_train_batch_size": 2,
    }  # fmt: skip
    distributed = property(lambda self: ParallelMode.DISTRIBUTED)
    monkeypatch.setattr(TrainingArguments, "parallel_mode", distributed)
    monkeypatch.setattr(RecipeTrainer, "train", stop)
    error: type[Exception]
    if leaves_out and has_text_alone:
        error, message = ValueError, "ddp_find_unused_parameters: expected true on several ranks"
    else:
        error, message = Prepared, "training would begin"
    with pytest.raises(error, match=message):
        run(place, tmp_path / "out", **changes)


class Prepared(Exception):  # noqa: N818 - not an error: as far as the test goes
    """Training would begin."""


def stopped() -> Any:
    return pytest.raises(Prepared, match="training would begin")


def stop(*_: Any, **__: Any) -> None:
    raise Prepared("training would begin")


def test_modules_beside_an_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT keeps the projector in bfloat16, and the adapter in float32."""
    half = tmp_path / "half"
    shutil.copytree(place / "model", half)
    AutoModelForImageTextToText.from_pretrained(half).bfloat16().save_pretrained(half)
    monkeypatch.setattr(RecipeTrainer, "train", stop)
    stage = {"name": "tune", "trainable": ["projector", "llm"], "max_steps": 1}
    changes = {"model": str(half), "stages": [stage], "pre": None, "lora": {"r": 4}}
    with pytest.warns(UserWarning, match="numbers that train are bf") as caught, stopped():
        run(place, tmp_path / "out", **changes)
    [said] = [str(x.message) for x in caught if "bfloat16" in str(x.message)]
    weights = load_file(half / "model.safetensors")
    projector = sum(x.numel() for name, x in weights.items() if "projector" in name)
    assert said.startswith(f"model: {projector:,} of ")
    assert (
        "those of modules beside the adapter" in said
        and "doubles the memory of a bfloat16 model's frozen weights" in said
    )
    with warnings.catch_warnings(record=True) as others, stopped():
        warnings.simplefilter("always")
        run(place, tmp_path / "wide", **changes, model_arguments={"dtype": "float32"})
    assert not [x for x in others if "bfloat16" in str(x.message)]


class Sharded(RecipeTrainer):
    """As under FSDP, which has float32 copies of what trains beside mixed precision."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_fsdp_enabled = True


@pytest.mark.parametrize(
    ("trainer_class", "is_mixed", "count"),
    [(Sharded, True, 0), (Sharded, False, 1), (RecipeTrainer, True, 1), (RecipeTrainer, False, 1)],
)
def test_fsdp_s_copies_are_float32(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainer_class: type,
    is_mixed: bool,
    count: int,
) -> None:
    """Of weights of bfloat16, in mixed precision: no step is lost, and none is warned of."""
    half = tmp_path / "half"
    shutil.copytree(place / "model", half)
    AutoModelForImageTextToText.from_pretrained(half).bfloat16().save_pretrained(half)
    monkeypatch.setattr("prereg_kernels.train.run.RecipeTrainer", trainer_class)
    monkeypatch.setattr("prereg_kernels.train.run.prepare", stop)
    with warnings.catch_warnings(record=True) as caught, stopped():
        warnings.simplefilter("always")
        run(place, tmp_path / "out", model=str(half), trainer__bf16=is_mixed, pre=None)
    said = [str(x.message) for x in caught if "numbers that train are bfloat16" in str(x.message)]
    assert len(said) == count
