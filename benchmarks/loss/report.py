# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark's samples say: medians, ratios, bars; and its short table."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.report import Json, bar, bar_lines, fastest, is_timed

KILOBYTES_FREE = 64  # held between forward and backward: bookkeeping, not data

# What each of ours is measured against; where several are meant, the fastest of them counts.
RIVALS = {
    "eager": ("eager", "eager, index_select"),
    "compile": ("compiled eager", "compiled eager, max-autotune"),
    "Liger's scheme": ("Liger's scheme",),
}
SPEEDUP_BARS = {"eager": (1.25, 1.5), "compile": (1.15, 1.3), "Liger's scheme": (1.3, 1.6)}
FLOOR_BAR = (1.15, 1.05)
LINEAR_BAR = 1.10


def add_ratios(variants: Json) -> None:
    """time / floor, of the floor that does the same matmuls; speed-ups of ours over the rivals."""
    for name, variant in variants.items():
        floor = variants.get("forward floor" if name.startswith("forward") else "floor")
        if is_timed(variant) and is_timed(floor):
            variant["ratio_to_floor"] = variant["median_ms"] / floor["median_ms"]
    for name in ("fused", "tap"):
        if is_timed(variants.get(name)):
            ours = variants[name]["median_ms"]
            found = {rival: fastest(variants, names) for rival, names in RIVALS.items()}
            variants[name]["speedups"] = {
                rival: time / ours for rival, time in found.items() if time is not None
            }
    if is_timed(variants.get("forward")) and is_timed(variants.get("forward, eager")):
        ours, eager = (variants[name]["median_ms"] for name in ("forward", "forward, eager"))
        variants["forward"]["speedups"] = {"eager": eager / ours}


def bars(results: Json) -> list[Json]:
    """Every performance bar that concerns a GPU, in a fixed order."""
    cases = {case["name"]: case["variants"] for case in results["cases"]}
    found = []
    for case in ("LLaVA", "Qwen2.5"):
        variants = cases.get(case, {})
        for name in ("fused", "tap"):
            ratio = variants.get(name, {}).get("ratio_to_floor")
            found.append(bar(f"{case}, {name}: time / floor", *FLOOR_BAR, ratio, False, ""))
        others = cases.get(f"{case}, autotuned", {})
        for rival, goals in SPEEDUP_BARS.items():
            speedups = [x.get("fused", {}).get("speedups", {}) for x in (variants, others)]
            speedup = min((s[rival] for s in speedups if rival in s), default=None)
            found.append(bar(f"{case}, fused: faster than {rival}", *goals, speedup, True, "x"))
    held = cases.get("LLaVA", {}).get("tap", {}).get("held_bytes")
    held = None if held is None else held / 1024
    name = "LLaVA, tap: held between forward and backward"
    found.append(bar(name, KILOBYTES_FREE, None, held, False, " KB"))
    found += _growth_bars([case for case in results["cases"] if case["name"].startswith("N=")])
    return found


def _growth_bars(sweep: Sequence[Json]) -> list[Json]:
    """How far from linear the time, and from constant the scratch is as N grows."""
    found = []
    for name in ("fused", "tap"):
        per_token, scratch = [], []
        for case in sweep:
            variant = case["variants"].get(name)
            if is_timed(variant):
                per_token.append(variant["median_ms"] / case["tokens"])
                if "scratch_bytes" in variant:
                    scratch.append(variant["scratch_bytes"])
        complete = bool(sweep) and len(per_token) == len(sweep)
        growth = max(per_token) / min(per_token) if complete else None
        label = f"{name}: time per token over N"
        found.append(bar(label, LINEAR_BAR, None, growth, False, "x"))
        # a chunk is at its full size from the third N on
        rest = scratch[2:] if len(scratch) == len(sweep) else []
        growth = max(rest) / min(rest) if rest else None
        found.append(bar(f"{name}: scratch over N", LINEAR_BAR, None, growth, False, "x"))
    return found


def short_table(results: Json) -> str:
    """What the run found, for a terminal; the bars last."""
    ceilings = results.get("ceilings", {})
    lines = [
        f"{results['machine']['device']}; copy {ceilings.get('copy_gb_s', 0):.0f} GB/s, bf16 "
        f"matmul {ceilings.get('matmul_tflop_s', 0):.0f} TFLOP/s; {results['seconds']:.0f} s"
    ]
    for case in results["cases"]:
        lines.append(f"\n{case['name']}: N={case['tokens']} {'x'.join(map(str, case['widths']))}")
        lines += [_variant_line(name, variant) for name, variant in case["variants"].items()]
    lines += kernel_lines(results)
    lines += [f"problem: {problem}" for problem in results["problems"]]
    return "\n".join([*lines, "", *bar_lines(results["bars"])])


def _variant_line(name: str, variant: Json) -> str:
    if not is_timed(variant):
        return f"  {name:<22} {variant['status']}: {variant.get('reason', '')}"[:110]
    cells = [f"  {name:<22}{variant['median_ms']:>9.3f} ms"]
    cells.append(f"{variant['ratio_to_floor']:>7.3f}" if "ratio_to_floor" in variant else " " * 7)
    if "peak_bytes" in variant:
        cells.append(f"peak {variant['peak_bytes'] / 2**20:>7.0f} MiB")
        cells.append(f"held {variant['held_bytes'] / 2**20:>7.1f} MiB")
    return "  ".join(cells)


def kernel_lines(results: Json) -> list[str]:
    """Launches, row kernels and stages, a line each."""
    lines = []
    for launch in results.get("launches", []):
        lines.append(
            f"{launch['case']}, {launch['name']}: graph {launch['graph_ms']:.3f} ms, stream "
            f"{launch['stream_ms']:.3f}, from an idle device {launch['idle_ms']:.3f}"
        )
    for kernel in results.get("row_kernels", []):
        if "error" in kernel:
            continue
        lines.append(
            f"  {kernel['backend']:<7}{kernel['name']:<28}{1e3 * kernel['median_ms']:>8.1f} us"
            f"{kernel['percent_of_copy']:>6.0f}% of the copy rate"
        )
    for stage in results.get("stages", []):
        if stage["apart_ms"] is None or not stage["fused_ms"]:
            continue
        best = min(stage["fused_ms"], key=stage["fused_ms"].__getitem__)
        lines.append(
            f"  {stage['case']:<11}{stage['name']:<20} apart {1e3 * stage['apart_ms']:>7.1f} us, "
            f"fused {1e3 * stage['fused_ms'][best]:>7.1f} ({best}): {stage['speedups'][best]:.3f}x"
        )
    return lines
