# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there.

`<run>/checkpoints/step-00000400/` is a Hugging Face directory (config, safetensors weights,
tokenizer) with PRe's heads and the training state beside, and a list of its files with their
digests. It is written under another name, flushed to the disk and renamed; only then is the
checkpoint before it deleted. So at every instant, a full disk and a power cut included, the newest
`step-*` directory is whole. Nothing else in `checkpoints` is read, replaced or deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prereg_kernels._util.files import printable, read_json
from prereg_kernels.demo.checkpoints.manifest import (
    MANIFEST,
    check_files,
    read_manifest,
    write_manifest,
)
from prereg_kernels.demo.checkpoints.training_state import (
    check_generators,
    check_optimizer,
    generators,
    set_generators,
)

CHECKPOINTS = "checkpoints"
_STATE, _TENSORS = "training_state.json", "training_state.pt"
_NAME = re.compile(r"step-(\d{8})(\.writing)?")
_TEMPORARY, _DAMAGED = ".writing", ".damaged"
# What a checkpoint of version 0.1.0 holds, which has no list of its files.
_FILES = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|tokenizer|tokenizer_config"
    r"|special_tokens_map|training_state)\.json|training_state\.pt|chat_template\.\w+"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|pre/pre_heads\.safetensors"
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one line for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        path: its directory, loadable by `from_pretrained`.
        step: optimizer steps done.
        stage: index of the stage whose optimizer it holds.
        config: the run's settings, as plain values.
        damaged: {newer checkpoint: what is wrong with it}.
    """

    path: Path
    step: int
    stage: int
    config: dict[str, Any]
    damaged: dict[Path, str]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps goes."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def checkpoints_in(run_dir: Path, *, half_written: bool = False) -> list[Path]:
    """What has a checkpoint's name, whoever made it."""
    directory = run_dir / CHECKPOINTS
    if not directory.is_dir():
        return []
    matches = ((path, _NAME.fullmatch(path.name)) for path in directory.iterdir())
    return [path for path, match in matches if match and (half_written or not match[2])]


def steps_saved(run_dir: Path) -> int:
    """Optimizer steps done at the newest checkpoint, by its name; 0 where there is none."""
    return max((int(path.name.split("-")[1]) for path in checkpoints_in(run_dir)), default=0)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` has a checkpoint's name and mark, damaged though it may be."""
    names = (MANIFEST, _STATE, _TENSORS)
    return bool(_NAME.fullmatch(path.name)) and any((path / name).is_file() for name in names)


def save_checkpoint(
    run_dir: Path,
    *,
    step: int,
    stage: int,
    config: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    write_model: Callable[[Path], None],
) -> Path:
    """Write the checkpoint after `step` steps, then delete those before it.

    Args:
        write_model: writes the model, its tokenizer and PRe's heads into the directory it is given.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: it could not be written; the checkpoint before is still there, whole.
    """
    final = checkpoint_path(run_dir, step)
    temporary = final.with_name(final.name + _TEMPORARY)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_model(temporary)
        torch.save({"optimizer": optimizer.state_dict(), "rng": generators()}, temporary / _TENSORS)
        state = {"step": step, "stage": stage, "config": config}
        (temporary / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        write_manifest(temporary)
        _set_permissions(temporary, max(checkpoints_in(run_dir), default=None))
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        temporary.rename(final)
        _flush(final.parent)
    except Exception as error:
        # Not OSError alone: safetensors and torch wrap a full disk in errors of their own.
        shutil.rmtree(temporary, ignore_errors=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"could not write checkpoint {final}: {reason} (the checkpoint before it is kept)"
        ) from error
    for other in sorted(checkpoints_in(run_dir, half_written=True), reverse=True):
        if other != final and _not_ours(other) is None:
            _delete(other)
    return final


def clear_checkpoints(run_dir: Path) -> None:
    """Delete a run's checkpoints: a new run in its directory must not resume from them.

    Raises:
        CheckpointError: they could not be deleted, or hold what is not the run's; then all of them
            are still there.
    """
    found = sorted(checkpoints_in(run_dir, half_written=True), reverse=True)
    for path in found:
        if (reason := _not_ours(path)) is not None:
            raise CheckpointError(f"will not delete {printable(path)}: {reason}; move it away")
    for path in found:
        try:
            _delete(path, ignore_errors=False)
        except OSError as error:
            raise CheckpointError(f"could not delete {printable(path)}: {error}") from error


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where none was written.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    damaged: dict[Path, str] = {}
    for path in sorted(checkpoints_in(run_dir), reverse=True):
        try:
            return _read(path, damaged)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            known = isinstance(error, (OSError, ValueError))
            damaged[path] = " ".join((str(error) if known else repr(error)).split())
    for path, reason in damaged.items():
        raise CheckpointError(
            f"could not read checkpoint {printable(path)}: {reason}; there is no whole one before "
            "it: restore it from a copy, or start anew with --fresh (resume=False)"
        )
    return None


def set_damaged_aside(checkpoint: Checkpoint) -> list[str]:
    """Rename the damaged checkpoints after this one, which the run will write again.

    Returns:
        A line about each, for the user.

    Raises:
        CheckpointError: it could not be renamed, or is none of ours.
    """
    lines = []
    for path, reason in checkpoint.damaged.items():
        if not is_checkpoint(path):
            raise CheckpointError(
                f"{printable(path)} has a checkpoint's name, but is none; move it away"
            )
        aside = path.with_name(path.name + _DAMAGED)
        number = 1
        while os.path.lexists(aside):
            number += 1
            aside = path.with_name(f"{path.name}{_DAMAGED}-{number}")
        try:
            path.rename(aside)
        except OSError as error:
            raise CheckpointError(f"could not rename {printable(path)}: {error}") from error
        lines.append(
            f"checkpoint {printable(path)} is damaged: {reason}; going on from "
            f"{checkpoint.path.name}; the damaged one is now {printable(aside.name)}"
        )
    return lines


def restore_optimizer(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer | None,
    *,
    steps: int | None = None,
    idle: Collection[torch.nn.Parameter] = (),
) -> None:
    """Put back the random generators' state and, if given, the optimizer's.

    Args:
        steps: that the optimizer had done; None: any.
        idle: its parameters that may never have had a gradient.

    Raises:
        CheckpointError: they cannot be read, or do not fit; then nothing was put back.
    """
    path = checkpoint.path / _TENSORS
    try:
        state = _tensors(checkpoint.path)
        check_generators(state["rng"])
        if optimizer is not None:
            check_optimizer(state["optimizer"], optimizer, steps, idle)
    except Exception as error:
        known = isinstance(error, (ValueError, RuntimeError))
        reason = " ".join((str(error) if known else repr(error)).split())
        raise CheckpointError(f"could not read {printable(path)}: {reason}") from error
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    set_generators(state["rng"])


def check_same_config(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Raise ValueError, naming the first setting that differs, unless the run's settings are the
    checkpoint's."""

    def flat(value: Any, at: str) -> dict[str, Any]:
        if isinstance(value, dict):
            items = [(f"{at}.{key}" if at else str(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            items = [(f"{at}[{i}]", item) for i, item in enumerate(value)]
        else:
            return {at: value}
        return {name: leaf for key, item in items for name, leaf in flat(item, key).items()}

    saved, asked = flat(checkpoint.config, ""), flat(config, "")
    for name in sorted({*saved, *asked}):
        if name not in saved or name not in asked or saved[name] != asked[name]:
            raise ValueError(
                f"{name}: cannot resume {checkpoint.path}: it was trained with "
                f"{saved.get(name, 'no such setting')!r}, this run asks for "
                f"{asked.get(name, 'no such setting')!r}; use another directory or resume=False"
            )


def _read(path: Path, damaged: dict[Path, str]) -> Checkpoint:
    """Check and describe a checkpoint; what is raised says what is wrong with it."""
    state = read_json(path / _STATE)
    files = read_manifest(path)
    if files is not None:
        check_files(path, files, {_STATE, _TENSORS})
    else:
        for file in path.rglob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
        _tensors(path)
    step, stage, config = state["step"], state["stage"], state["config"]
    if type(step) is not int or path.name != checkpoint_path(path, step).name:
        raise ValueError(f"{_STATE} is of step {step!r}, expected that of the directory's name")
    if type(stage) is not int or stage < 0 or not isinstance(config, dict):
        raise ValueError(f"{_STATE}: expected a stage and settings, got {stage!r}, {config!r}")
    return Checkpoint(path, step, stage, config, damaged)


def _tensors(path: Path) -> dict[str, Any]:
    """The states of the optimizer and the generators."""
    try:
        state = torch.load(path / _TENSORS, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own advice, below the first line, is to trust the file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{_TENSORS} cannot be read: {reason[:200]}") from error
    if not isinstance(state, dict) or state.keys() != {"optimizer", "rng"}:
        raise ValueError(f"{_TENSORS}: expected the states of the optimizer and the generators")
    return state


def _not_ours(path: Path) -> str | None:
    """Why not all of `path` was written by a run; None where it was."""
    if path.is_symlink() or not path.is_dir():
        return "it is not a directory of this run"
    if path.name.endswith(_TEMPORARY):
        return None  # cut short, perhaps before there was anything to tell it by
    if not is_checkpoint(path):
        return "it has a checkpoint's name, but is none"
    try:
        listed = read_manifest(path)
    except (OSError, ValueError):
        listed = None
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        ours = name in listed if listed is not None else _FILES.fullmatch(name)
        if not file.is_dir() and name != MANIFEST and not ours:
            return f"{printable(name)} in it is not the run's"
    return None


def _delete(path: Path, *, ignore_errors: bool = True) -> None:
    """Delete a checkpoint: at no instant is there a part of it under its name."""
    if not path.name.endswith(_TEMPORARY):
        temporary = path.with_name(path.name + _TEMPORARY)
        try:
            path = path.rename(temporary)
        except OSError:
            if not ignore_errors:
                raise
            return
    shutil.rmtree(path, ignore_errors=ignore_errors)


def _set_permissions(new: Path, before: Path | None) -> None:
    """Those of the checkpoint before; for what it has not, those that the umask leaves."""
    plain = stat.S_IMODE((new / _STATE).stat().st_mode)  # safetensors writes files for nobody else
    for path in [new, *new.rglob("*")]:
        there = None if before is None else before / path.relative_to(new)
        if there is not None and there.exists():
            shutil.copymode(there, path)
        elif path.is_file():
            path.chmod(plain)


def _flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
