# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's results as Markdown, for the README."""

from __future__ import annotations

from benchmarks.common.report import Json, markdown_table

MAIN_CASES = ("LLaVA", "Qwen2.5", "fp32 weights", "small head", "linear head")


def gpu_markdown(results: Json) -> str:
    """The cases, the bars, and under them what was measured on."""
    parts = [_case_table(results), _bar_table(results)]
    if results["row_kernels"]:
        parts.append(_kernel_table(results))
    machine, ceilings = results["machine"], results["ceilings"]
    dirty = " with changes" if machine["dirty"] else ""
    parts.append(
        f"Forward and backward unless it says forward, medians of interleaved rounds on "
        f"{machine['device']} (driver {machine['driver']}), torch {machine['torch']}, triton "
        f"{machine['triton']}, commit {machine['commit']}{dirty}, {machine['date'][:10]}. The "
        f"floor is the matmuls alone. Measured ceilings: copy {ceilings['copy_gb_s']:.0f} GB/s, "
        f"bf16 matmul {ceilings['matmul_tflop_s']:.0f} TFLOP/s. Peak memory is a step's, beyond "
        "its inputs; held memory is what forward leaves for backward."
    )
    return "\n\n".join(parts)


def _case_table(results: Json) -> str:
    rows = []
    for case in results["cases"]:
        if case["name"] not in MAIN_CASES:
            continue
        widths = "→".join(map(str, case["widths"]))
        label = f"{case['name']}: N={case['tokens']}, {widths}"
        for name, variant in case["variants"].items():
            rows.append([label, name, *_cells(variant)])
            label = ""
    head = ["case", "implementation", "median", "time / floor", "peak memory", "held"]
    return markdown_table(head, rows, left=2)


def _cells(variant: Json) -> list[str]:
    if variant["status"] != "ok":
        return [variant["status"], "", "", ""]
    cells = [f"{variant['median_ms']:.2f} ms"]
    cells.append(f"{variant['ratio_to_floor']:.3f}" if "ratio_to_floor" in variant else "")
    for key in ("peak_bytes", "held_bytes"):
        cells.append(_bytes(variant[key]) if key in variant else "")
    return cells


def _bytes(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 2**20 else f"{count / 2**20:.0f} MiB"


def _bar_table(results: Json) -> str:
    rows = []
    for found in results["bars"]:
        sign = "≥" if found["at_least"] else "≤"
        measured = found["measured"]
        verdict = "not measured" if measured is None else "met" if found["met"] else "missed"
        verdict += ", aim met" if found["aim_met"] else ""
        value = "" if measured is None else f"{measured:.2f}{found['unit']}"
        aim = "" if found["aim"] is None else f"{found['aim']:.2f}"
        rows.append([found["name"], f"{sign} {found['bar']:.2f}", aim, value, verdict])
    return markdown_table(["bar", "at least / most", "aim", "measured", ""], rows, left=1)


def _kernel_table(results: Json) -> str:
    rows = []
    for kernel in results["row_kernels"]:
        cells = [kernel["name"], kernel["backend"], kernel["formula"]]
        if "error" in kernel:
            rows.append([*cells, "failed", ""])
            continue
        time, share = f"{1e3 * kernel['median_ms']:.0f} µs", f"{kernel['percent_of_copy']:.0f}%"
        rows.append([*cells, time, share])
    head = ["row kernel", "backend", "bytes", "median", "of the copy rate"]
    return markdown_table(head, rows, left=3)
