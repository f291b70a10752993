# SPDX-License-Identifier: Apache-2.0
"""Training steps of small models on this CPU, by which estimates for CPUs are calibrated.

    python -m benchmarks.step.cpu               # three minutes on a quiet machine
    python -m benchmarks.step.cpu --size tiny --out FILE    # seconds: is it whole?
    python -m benchmarks.step.cpu --table       # prints what is there, each row left out

Each row is a process of its own: a LLaVA or a Qwen2.5-VL with random weights, one thread, with and
without PRe, checkpointing and bfloat16. Its time is the processor's, the median of its steps, its
memory the peak of a step beyond what the process had before the model. A CPU that only emulates
products of bfloat16 takes minutes for each of its rows: it has the others alone, and leaves the
package's copy as it is. Writes
benchmarks/results/estimate_cpu.json and, of the same content, the package's own copy.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.report import RESULTS, Json, made_on, write_json
from benchmarks.loss.checks import is_emulated
from benchmarks.step.models import Recipe, build_model, make_batch, set_checkpointing
from prereg_kernels import apply_pre
from prereg_kernels._util.machine import describe_machine
from prereg_kernels.estimate import cpu
from prereg_kernels.estimate.estimate import measured_work
from prereg_kernels.estimate.memory import peak
from prereg_kernels.estimate.settings import Settings
from prereg_kernels.estimate.walk import walk
from prereg_kernels.train.parts import parts_of

OUT = RESULTS / "estimate_cpu.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MMAP_THRESHOLD = -3  # of glibc's mallopt
STEPS, WARMUP = 3, 1


@dataclass(frozen=True)
class Case:
    """A row: a model and a step of it."""

    family: str
    width: int
    layers: int
    samples: int
    text: int
    side: int  # patches of an image's side
    dtype: str = "float32"
    checkpointing: bool = False
    pre: bool = True
    words: int = 4096


CASES = (
    Case("llava", 512, 6, 2, 96, 12),
    Case("llava", 512, 6, 4, 96, 12, "bfloat16"),
    Case("llava", 256, 12, 4, 64, 8, checkpointing=True),
    Case("llava", 256, 12, 8, 64, 8, "bfloat16", checkpointing=True),
    Case("llava", 384, 6, 2, 384, 6, words=16_384, pre=False),
    Case("llava", 384, 6, 4, 384, 6, "bfloat16", words=16_384, pre=False),
    Case("qwen", 512, 4, 2, 64, 16),
    Case("qwen", 512, 4, 4, 64, 16, "bfloat16"),
    Case("llava", 768, 4, 1, 320, 12, checkpointing=True, pre=False),
    Case("llava", 1024, 4, 2, 320, 12, "bfloat16"),
    Case("llava", 512, 6, 2, 96, 12, pre=False),
    Case("llava", 512, 6, 4, 96, 12, "bfloat16", pre=False),
    Case("llava", 512, 6, 2, 96, 12, checkpointing=True),
    Case("llava", 512, 6, 4, 96, 12, "bfloat16", checkpointing=True),
    Case("qwen", 256, 8, 4, 96, 16, checkpointing=True),
    Case("qwen", 768, 6, 2, 256, 16, "bfloat16"),
)
TINY = tuple(
    replace(case, width=64, layers=2, samples=1, text=24, side=4, words=256) for case in CASES[:8]
)


def recipe_of(case: Case) -> Recipe:
    """The model's config and its samples, as the GPU's benchmark has them."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

    heads = case.width // 64
    text: Json = {
        "hidden_size": case.width, "intermediate_size": 11 * case.width // 4,
        "num_hidden_layers": case.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": case.words, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    last = case.words - 1

    def config() -> Any:
        if case.family == "llava":
            vision = CLIPVisionConfig(
                hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                image_size=8 * case.side, patch_size=8, projection_dim=32,
            )  # fmt: skip
            return LlavaConfig(
                vision_config=vision, text_config=LlamaConfig(**text), image_token_id=last,
                image_seq_length=case.side**2, tie_word_embeddings=False,
            )  # fmt: skip
        rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
        return Qwen2_5_VLConfig(
            vision_config={
                "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2,
                "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2,
                "window_size": 64, "out_hidden_size": case.width, "fullatt_block_indexes": [1],
            },
            text_config=text | {"rope_parameters": rotary},
            image_token_id=last, video_token_id=last - 1, vision_start_token_id=last - 2,
            vision_end_token_id=last - 3, tie_word_embeddings=False,
        )  # fmt: skip

    return Recipe(case.family, config, case.samples, case.text, (case.side, case.side))


def settings_of(case: Case) -> Settings:
    """The same step, as it is estimated."""
    return Settings(
        images_per_step=case.samples, tokens=case.text, gpu="cpu", optimizer="sgd",
        weights=case.dtype, checkpointing=case.checkpointing,
    )  # fmt: skip


def counted(case: Case) -> Json:
    """What the estimate says of the row's work and memory, before any rate."""
    recipe = recipe_of(case)
    config = recipe.config()
    model = build_model(config, torch.device("meta"), DTYPES[case.dtype])
    batch = make_batch(recipe, config, 1, torch.device("cpu"), DTYPES[case.dtype])
    lengths = [batch["input_ids"].shape[1]]
    structure = walk(model, [batch], case.family, parts_of(model), lengths=lengths)
    work, moments = measured_work(structure, settings_of(case), case.pre)
    highest = peak(moments)
    return {
        "itemsize": structure.itemsize, "flops": work.flops, "moved": work.moved,
        "calls": work.calls, "counted_bytes": highest.total,
        "counted_peak": f"{highest.phase}, {highest.place}",
    }  # fmt: skip


class Run:
    """A model and its step in this process."""

    def __init__(self, case: Case) -> None:
        recipe = recipe_of(case)
        config = recipe.config()
        device = torch.device("cpu")
        self.model = build_model(config, device, DTYPES[case.dtype])
        set_checkpointing(self.model, case.checkpointing)
        if case.pre:
            apply_pre(self.model)
        self.batch = make_batch(recipe, config, case.samples, device, DTYPES[case.dtype])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-6)

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def seconds_of(case: Case) -> float:
    """The median of the steps."""
    run = Run(case)
    times = []
    for _ in range(WARMUP + STEPS):
        begin = time.process_time()
        run.step()
        times.append(time.process_time() - begin)
    return statistics.median(times[WARMUP:])


def bytes_of(case: Case) -> float:
    """The peak of a step, beyond what there was before the model."""
    # What is freed goes back, so that the resident size is what is held
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 64 * 1024)
    Run(replace(case, width=64, layers=2, samples=1, text=16, side=4, words=256)).step()
    before = _status("VmRSS")
    run = Run(case)
    run.step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run.step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def in_a_process(function: Any, case: Case) -> Any:
    """Its result, of a fork: libraries are loaded, and nothing else has been allocated."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, json.dumps(function(case)).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return json.loads(pipe.read())


def table(results: Json) -> str:
    """A line a row: what was measured, and by how much the estimate of the others misses it."""
    calibration = cpu.calibrated(results)
    lines = [made_on(results["machine"])]
    for number, row in enumerate(results["rows"]):
        guess = cpu.left_out(results["rows"], number)
        case = " ".join(str(x) for x in row["case"].values())
        lines.append(
            f"{case:<50} {row['seconds']:7.3f} s {_miss(guess, row, 'seconds')}"
            f"  {row['bytes'] / 2**20:7.1f} MiB {_miss(guess, row, 'bytes')}"
            f"  {row['counted_peak']}"
        )
    for name in ("seconds", "bytes"):
        lines.append(
            f"{name}: half of the rows within {calibration.median[name]:.1%}, nine tenths within "
            f"{calibration.error[name]:.1%}"
        )
    lines.append(f"rates: {calibration.rates}, overhead {calibration.overhead}")
    return "\n".join(lines)


def _miss(guess: Json, row: Json, name: str) -> str:
    """By how much; a tiny model's step may add no page to what the process has."""
    return f"{guess[name] / row[name] - 1:+6.1%}" if row[name] else "   n/a"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.out.read_text())))
        return
    torch.set_num_threads(1)
    cases = [
        case
        for case in (TINY if options.size == "tiny" else CASES)
        if not is_emulated(getattr(torch, case.dtype), torch.device("cpu"))
    ]
    rows: list[Json] = []
    results: Json = {"machine": describe_machine(torch.device("cpu"), None), "threads": 1}
    for case in cases:
        row = {"case": asdict(case), "seconds": in_a_process(seconds_of, case)}
        row["bytes"] = in_a_process(bytes_of, case)
        rows.append(row | in_a_process(counted, case))
        results["rows"] = rows
        write_json(results, options.out)
    if cases == list(CASES):
        write_json(results, cpu.FILE)
    print(table(results))


if __name__ == "__main__":
    main()
