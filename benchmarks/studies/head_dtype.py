# SPDX-License-Identifier: Apache-2.0
"""What the dtype of the heads does on a bfloat16 model, and what float32 heads cost a call.

    python -m benchmarks.studies.head_dtype             # about 5 minutes on two cores
    python -m benchmarks.studies.head_dtype --table     # prints what is there

Counts the weights that AdamW moves, times the op with weights of both dtypes in turn, and goes on
training the demo's model in bfloat16 at a learning rate of full fine-tuning; writes
benchmarks/results/head_dtype.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.report import RESULTS, made_on, write_json
from prereg_kernels import PReHead, apply_pre
from prereg_kernels._util.machine import describe_machine

OUT = RESULTS / "head_dtype.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
RATES = (1e-5, 2e-5)
STEPS = 60  # of AdamW, for the share of weights that move
TOKENS, WIDTH, REPEATS = 2048, 1024, 40
DEMO_STEPS, DEMO_RATE = 100, 2e-5


def share_moved(head_dtype: torch.dtype, rate: float) -> float:
    """Of the weights of a head of a tiny bfloat16 LLaVA, those that are not what they were."""
    from tests.tiny import make_batch, tiny_llava

    model, batch = tiny_llava().to(torch.bfloat16), make_batch((1, 2))
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    pre = apply_pre(model, head_dtype=head_dtype)
    before = [p.detach().clone() for p in pre.heads[2].parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    pairs = list(zip(before, pre.heads[2].parameters(), strict=True))
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def call_times() -> dict[str, dict[str, list[float]]]:
    """{"loss" or "tap": {dtype of the weights: seconds of each forward and backward pass}}."""
    generator = torch.Generator().manual_seed(0)
    hidden, anchor, residual = (
        torch.randn(TOKENS, WIDTH, generator=generator).bfloat16() for _ in range(3)
    )
    hidden.requires_grad_()
    heads = {name: PReHead(WIDTH, WIDTH, seed=0, dtype=dtype) for name, dtype in DTYPES.items()}

    def loss(head: PReHead) -> None:
        head(hidden, anchor).backward()

    def tap(head: PReHead) -> None:
        tapped, value = head.tap(hidden, anchor)
        torch.autograd.backward([value, tapped], [torch.ones_like(value), residual])

    calls: dict[str, Callable[[PReHead], None]] = {"loss": loss, "tap": tap}
    times: dict[str, dict[str, list[float]]] = {kind: {n: [] for n in heads} for kind in calls}
    for repeat in range(REPEATS + 3):
        for kind, call in calls.items():
            for name, head in heads.items():
                head.zero_grad()
                hidden.grad = None
                start = time.perf_counter()
                call(head)
                if repeat >= 3:
                    times[kind][name].append(time.perf_counter() - start)
    return times


def demo(cache: str, tower_steps: int, steps: int) -> dict[str, dict[str, Any]]:
    """{dtype of the heads: L_PRe and L_LM of each step, and the share of weights that moved}."""
    from benchmarks.studies.token_fraction import BASELINE, run_config
    from prereg_kernels.demo.data.packing import Packer, build_tokenizer
    from prereg_kernels.demo.loop import train
    from prereg_kernels.demo.stages import accumulate_gradients, stage_stream

    run = run_config(BASELINE, 0, steps)
    run = replace(run, tower=replace(run.tower, steps=tower_steps))
    with tempfile.TemporaryDirectory() as out:
        trained = train(run, out, cache_dir=cache, progress=False, tensorboard=False).model
    packer = Packer(build_tokenizer(run.scenes), run.scenes.patches)
    stream = stage_stream(run, run.stages[-1], packer)
    found: dict[str, dict[str, Any]] = {}
    for name, dtype in DTYPES.items():
        model = copy.deepcopy(trained).to(torch.bfloat16).train()
        model.model.vision_tower.requires_grad_(False)
        pre = apply_pre(model, layers=run.pre.layer, weight=run.pre.weight, head_dtype=dtype)
        before = [p.detach().clone() for p in pre.heads[run.pre.layer].parameters()]
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=DEMO_RATE, weight_decay=0.0
        )
        rows = []
        for step in range(DEMO_STEPS):
            optimizer.zero_grad()
            batches = [_in_bfloat16(batch) for batch in stream.micro_batches(step)]
            rows.append(accumulate_gradients(model, batches, pre))
            optimizer.step()
        after = pre.heads[run.pre.layer].parameters()
        pairs = list(zip(before, after, strict=True))
        moved = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        found[name] = {**columns, "moved": moved}
    return found


def _in_bfloat16(batch: Any) -> dict[str, Tensor]:
    return {n: x.bfloat16() if x.is_floating_point() else x for n, x in batch.items()}


def print_table(stored: dict[str, Any]) -> None:
    """Markdown: what moves, what a call costs, what the demo's loss does."""
    print("| heads |", *(f"weights moved at {rate:g} (%) |" for rate in RATES), end=" ")
    print("loss (ms) | tap (ms) | L_PRe in the demo, first and last ten steps |")
    print("|---" * (4 + len(RATES)) + "|")
    for name in DTYPES:
        cells = [f"{100 * stored['moved'][name][f'{rate:g}']:.0f}" for rate in RATES]
        for kind in ("loss", "tap"):
            low, middle, high = statistics.quantiles(stored["seconds"][kind][name], n=4)
            cells.append(f"{1e3 * middle:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})")
        values = stored["demo"][name]["pre_loss"]
        first, last = statistics.mean(values[:10]), statistics.mean(values[-10:])
        print("|", " | ".join([name, *cells, f"{first:.3f}, {last:.3f}"]), "|")
    for kind, times in stored["seconds"].items():
        pairs = zip(*(times[name] for name in DTYPES), strict=True)
        low, middle, high = statistics.quantiles([after / before for before, after in pairs], n=4)
        print(f"\n{kind}: float32 over bfloat16, in pairs: {middle:.2f} ({low:.2f} to {high:.2f})")
    print(
        f"\n{STEPS} steps of AdamW; medians and quartiles of {REPEATS} calls in turn, {TOKENS} "
        f"tokens, width {WIDTH}; {DEMO_STEPS} steps at {DEMO_RATE:g}. "
        f"{made_on(stored['machine'])}."
    )


def main() -> None:
    """Run everything, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", default="runs/scenes/cache", help="where trained towers are")
    parser.add_argument("--tower-steps", type=int, default=850)
    parser.add_argument("--steps", type=int, default=330, help="of the demo before its fine-tuning")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return print_table(json.loads(arguments.out.read_text()))
    torch.set_num_threads(1)
    moved = {
        name: {f"{rate:g}": share_moved(dtype, rate) for rate in RATES}
        for name, dtype in DTYPES.items()
    }
    stored = {
        "machine": describe_machine(torch.device("cpu"), None),
        "moved": moved,
        "seconds": call_times(),
        "tower_steps": arguments.tower_steps,
        "steps": arguments.steps,
        "demo": demo(arguments.cache, arguments.tower_steps, arguments.steps),
    }
    write_json(stored, arguments.out)
    print_table(stored)


if __name__ == "__main__":
    main()
