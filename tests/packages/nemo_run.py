# SPDX-License-Identifier: Apache-2.0
"""NeMo AutoModel's recipe with PRe on a CPU, as `automodel finetune CONFIG` runs it.

`python -m tests.packages.nemo_run FOLDER CONFIG`: FOLDER gets start.pt, the first step as
`tests.packages.definition` reads it, and end.pt, the weights at the end. The recipe asks for a GPU
in three places, and is shown a CPU there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

WORDS, IMAGE, PATCHES, LENGTH = (5, 200), 4, 4, 12


class OnCPU:
    """torch, whose GPU is the CPU."""

    cuda = SimpleNamespace(current_device=lambda: torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: torch.device("cpu")) if name == "device" else getattr(torch, name)


def make_rows(path_or_dataset: Any = None, split: Any = None, **_: Any) -> list[dict[str, Tensor]]:
    """A data set: one image or two in a row; as NeMo has them, labels are the next ids."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(16):
        images = 1 + number % 2
        ids = torch.randint(*WORDS, (LENGTH,), generator=generator)
        ids[: images * PATCHES] = IMAGE
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[: images * PATCHES + number % 3] = -100
        pixels = torch.randn(images, 3, 16, 16, generator=generator)
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return rows


def collate(rows: list[dict[str, Tensor]], processor: Any = None) -> dict[str, Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def whole(x: Any) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def show_cpu() -> None:
    """In the places where the recipe asks for a GPU."""
    from nemo_automodel._transformers import auto_model

    auto_model.torch = OnCPU()
    torch.cuda.reset_peak_memory_stats = lambda *_: None  # type: ignore[assignment]


def main(folder: str, config: str) -> None:
    from nemo_automodel.components.config.loader import load_yaml_config

    from prereg_kernels.trainers.nemo import PReFinetuneRecipeForVLM

    show_cpu()
    out, step = Path(folder), {}
    out.mkdir(parents=True, exist_ok=True)

    class Recorded(PReFinetuneRecipeForVLM):
        def named(self) -> dict[str, Any]:
            return dict(self.model_parts[0].named_parameters())

        def _run_train_optim_step(self, batches: Any, *args: Any, **kwargs: Any) -> Any:
            if not step:
                step["weights"] = {name: whole(p) for name, p in self.named().items()}
                step["batches"] = [dict(batch) for batch in batches]
            return super()._run_train_optim_step(batches, *args, **kwargs)

    recipe = Recorded(load_yaml_config(config))
    recipe.setup()

    def see(*_: Any) -> None:
        if "gradients" not in step:
            named = recipe.named().items()
            step["gradients"] = {name: whole(p.grad) for name, p in named if p.grad is not None}

    register_optimizer_step_pre_hook(see)
    recipe.run_train_validation_loop()
    end = {name: whole(p) for name, p in recipe.named().items()}
    if recipe.dist_env.is_main:
        torch.save(step, out / "start.pt")
        torch.save(end, out / "end.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
