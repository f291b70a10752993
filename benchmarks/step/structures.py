# SPDX-License-Identifier: Apache-2.0
"""Write the structures of the shipped models: `python -m benchmarks.step.structures`.

Each model takes its steps on the meta device, for each set of parts that may train: minutes. Names
of models after it choose some of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prereg_kernels.attach.resolver import resolve
from prereg_kernels.estimate.batches import made_up_batches
from prereg_kernels.estimate.shipped import FOLDER, TRAINS, config_of, file_of, names
from prereg_kernels.estimate.structure import Structure
from prereg_kernels.estimate.walk import walk
from prereg_kernels.train.parts import parts_of


def model_of(content: dict[str, Any]) -> nn.Module:
    """The model of a config.json, on the meta device, in bfloat16."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return model.train()


def walked(name: str, trains: Sequence[Sequence[str]] = TRAINS) -> list[Structure]:
    """The structures of a shipped model, as they are made now."""
    model = model_of(config_of(name))
    batches = made_up_batches(model, resolve(model).family)
    parts = parts_of(model)
    return [walk(model, batches, name, parts, some) for some in trains]


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of models; default: all")
    for name in parser.parse_args().names or names():
        (FOLDER / name / "structure.json").write_text(file_of(walked(name)))
        print(name)


if __name__ == "__main__":
    main()
