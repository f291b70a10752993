# SPDX-License-Identifier: Apache-2.0
"""The heads of a model with PRe attached, to files and back; `storage` has the file itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from prereg_kernels._util import distributed
from prereg_kernels.attach.heads import PASSES
from prereg_kernels.attach.state import HEADS, State
from prereg_kernels.attach.storage import (
    PRE_DIR,
    Saved,
    check_settings,
    check_shapes,
    load_heads,
    save_heads,
)


def save(state: State, path: str | Path, heads: Mapping[str, Tensor] | None = None) -> None:
    """See `PRe.save`."""
    own = state.parameters()
    whole = {n: distributed.whole(x) for n, x in (own if heads is None else heads).items()}
    _check_whole(state, whole)
    if any(x.is_meta for x in whole.values()):
        raise ValueError(
            "heads: expected parameters with values, got them on the meta device; save them "
            "once the model has left it, or pass heads="
        )
    sharded = heads is None and any(map(distributed.is_sharded, own.values()))
    if not sharded or distributed.rank() == 0:
        save_heads(Path(path), Saved(whole, state.settings(), state.passes))


def load(state: State, path: str | Path) -> None:
    """See `PRe.load`."""
    saved = load_heads(path)
    check_settings(saved, state.settings(), path)
    fill(state, saved, path)


def fill(state: State, saved: Saved, path: str | Path) -> None:
    """Fill the heads with what was read. Settings that do not shape them may differ."""
    _check_whole(state, state.parameters())
    check_shapes(saved, state.settings(), state.shapes, path)
    state.passes = saved.passes
    for key, head in getattr(state.model, HEADS).items():
        head.fill({name: saved.heads[f"{key}.{name}"] for name, _ in head.named_parameters()})


def save_pretrained(state: State, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `save_pretrained`, and then PRe's file in `pre/`.

    A `state_dict` without heads leaves them out.
    """
    model, original = state.model, state.shadowed("save_pretrained")
    if original is None:
        original = partial(type(model).save_pretrained, model)
    bound = inspect.signature(original).bind(save_directory, *args, **kwargs)
    bound.apply_defaults()
    options = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    given = options.get("state_dict")
    heads = None if given is None else heads_of(given)  # before they are taken out of it
    result = original(save_directory, *args, **kwargs)
    if heads != {}:
        heads = {n: distributed.whole(x) for n, x in (heads or state.parameters()).items()}
        if options.get("is_main_process", True) and distributed.rank() == 0:
            save(state, Path(save_directory) / PRE_DIR, heads)
            if options.get("push_to_hub"):
                _upload(Path(save_directory) / PRE_DIR, options)
    return result


def heads_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The heads in a state dict of the model, or of one around it: {name inside: parameter}."""
    marked = ((name.partition(f"{HEADS}."), x) for name, x in state_dict.items())
    return {inside: x for (_, mark, inside), x in marked if mark and inside != PASSES}


def _check_whole(state: State, heads: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(x.shape) for name, x in heads.items()}
    if shapes != state.shapes:
        raise ValueError(
            f"heads: expected whole parameters, {state.shapes}, got {shapes}; where DeepSpeed "
            "ZeRO-3 or FSDP1 partitions them, load before they wrap the model, and save with "
            "heads= (or save_pretrained with state_dict=) from a gathered state dict"
        )


def _upload(folder: Path, options: Mapping[str, Any]) -> None:
    """Upload the folder to where `push_to_hub=True` has put the model, in a second commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.get("token"))
    name = options.get("repo_id") or folder.parent.resolve().name
    api.upload_folder(
        repo_id=api.create_repo(name, exist_ok=True).repo_id,
        folder_path=folder,
        path_in_repo=folder.name,
        commit_message=options.get("commit_message") or "Upload PRe's heads",
        create_pr=options.get("create_pr", False),
    )
