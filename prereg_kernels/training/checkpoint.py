"""Checkpoints that are whole or not there.

`<run>/checkpoints/step-00000400/` is a Hugging Face directory (config, safetensors weights,
tokenizer) with PRe's heads and the training state beside. It is written under another name, flushed
to the disk and renamed; only then is the checkpoint before it deleted. So at every instant, a full
disk and a power cut included, the newest `step-*` directory is whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_STATE, _TENSORS = "training_state.json", "training_state.pt"
_TEMPORARY = ".writing"


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
    """

    path: Path
    step: int
    stage: int
    config: dict[str, Any]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps goes."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


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
        torch.save({"optimizer": optimizer.state_dict(), "rng": _rng_state()}, temporary / _TENSORS)
        state = {"step": step, "stage": stage, "config": config}
        (temporary / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
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
    for other in final.parent.glob("step-*"):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def clear_checkpoints(run_dir: Path) -> None:
    """Delete a run's checkpoints: a new run in its directory must not resume from them.

    Raises:
        CheckpointError: they could not be deleted.
    """
    try:
        shutil.rmtree(run_dir / "checkpoints")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"could not delete {run_dir / 'checkpoints'}: {error}") from error


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None.

    Raises:
        CheckpointError: it is there but cannot be read.
    """
    found = sorted(
        path for path in (run_dir / "checkpoints").glob("step-*") if path.suffix != _TEMPORARY
    )
    if not found:
        return None
    path = found[-1]
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, int(state["step"]), int(state["stage"]), state["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"could not read checkpoint {path}: {error!r}") from error


def restore_optimizer(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer | None) -> None:
    """Put back the random generators' state and, if given, the optimizer's."""
    try:
        state = torch.load(checkpoint.path / _TENSORS, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"could not read {checkpoint.path / _TENSORS}: {error}") from error
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    _set_rng_state(state["rng"])


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


def _rng_state() -> dict[str, Any]:
    """The generators of torch, NumPy and Python, as tensors and plain values only."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # the legacy global generator
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            gauss,
        ],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
