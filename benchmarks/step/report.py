# SPDX-License-Identifier: Apache-2.0
"""What a run of the training-step benchmark says, for a terminal: settings, bars, problems."""

from __future__ import annotations

from benchmarks.common.report import Json, bar, bar_lines, is_timed
from benchmarks.step.variants import OURS

TIME_BAR, MEMORY_BAR, MEMORY_AIM = 1.0, 1.0, 0.0  # percent of the step


def step_bars(results: Json) -> list[Json]:
    """Of every setting: time added by `apply_pre`, memory added beyond the head's own."""
    found = []
    for setting in results["settings"]:
        ours = setting["variants"].get(OURS)
        timed = ours if is_timed(ours) else {}
        aim = setting.get("flops", {}).get("head_percent")
        label = f"{setting['name']}, {OURS}: "
        found.append(
            bar(f"{label}step time", TIME_BAR, aim, timed.get("added_percent"), False, "%")
        )
        memory = timed.get("beyond_percent")
        found.append(bar(f"{label}memory", MEMORY_BAR, MEMORY_AIM, memory, False, "%"))
    return found


def step_table(results: Json) -> str:
    """The run in a page of text; the bars last."""
    lines = [f"{results['machine']['device']}; {results['seconds']:.0f} s"]
    if results["model"]:
        model, head = results["model"], results["head_bytes"]
        lines += [
            f"{model['name']}, {model['parameters'] / 1e9:.2f}e9 parameters, layer "
            f"{model['layer']}, {model['attention']} attention",
            f"the head: parameters {_mib(head['parameters'])}, gradients "
            f"{_mib(head['gradients'])}, optimizer {_mib(head['optimizer'])}",
        ]
    for name, variants in results["check"].items():
        errors = (f"{v} {e['head']:.1e}, {e['layer']:.1e}" for v, e in variants.items())
        lines.append(f"errors of the gradients (head, layer), {name}: {'; '.join(errors)}")
    for setting in results["settings"]:
        lines += _setting_lines(setting)
    if any(
        v.get("peak_bytes", 0) is None for s in results["settings"] for v in s["variants"].values()
    ):
        lines += ["", "memory: not measured, there is no GPU"]
    lines += [f"problem: {problem}" for problem in results["problems"]]
    return "\n".join([*lines, "", *bar_lines(results["bars"])])


def _setting_lines(setting: Json) -> list[str]:
    if "flops" not in setting:
        return [f"\n{setting['name']}: not measured"]
    flops = setting["flops"]
    lines = [
        f"\n{setting['name']}: {setting['batch']} x {setting['positions']} positions, "
        f"{setting['visual_tokens']} visual; {flops['without_head'] / 1e12:.4g} TFLOP and the "
        f"head's {flops['head'] / 1e12:.3g} ({flops['head_percent']:.2f}%); "
        f"the tower alone {setting['tower_ms']:.1f} ms"
    ]
    lines += [
        f"  batch {found['batch']} does not fit: {found['reason']}"
        for found in setting["backed_off"]
    ]
    return lines + [_variant_line(name, v, flops) for name, v in setting["variants"].items()]


def _variant_line(name: str, variant: Json, flops: Json) -> str:
    if not is_timed(variant):
        return f"  {name:<13} {variant['status']}: {variant.get('reason', '')}"[:110]
    median, (low, high) = variant["median_ms"], variant["quartiles_ms"]
    cells = [f"  {name:<13}{median:>10.2f} ms [{low:.2f}, {high:.2f}]"]
    if "added_percent" in variant:
        low, high = variant["added_percent_quartiles"]
        cells.append(f"{variant['added_ms']:+.2f} ms {variant['added_percent']:+.2f}%")
        cells.append(f"rounds {low:+.2f} to {high:+.2f}%")
        cells.append(f"of the LLM {variant['added_percent_llm']:+.2f}%")
    else:
        cells.append(f"{flops['without_head'] / median / 1e9:.0f} TFLOP/s")
    if variant["peak_bytes"] is not None:
        cells.append(f"peak {variant['peak_bytes'] / 2**30:.2f} GiB")
    if "beyond_bytes" in variant:
        cells.append(f"beyond the head {_mib(variant['beyond_bytes'])}")
    return "  ".join(cells)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
