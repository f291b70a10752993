# SPDX-License-Identifier: Apache-2.0
"""An estimate in words: the answer first, then a small table."""

from __future__ import annotations

from prereg_kernels.estimate.cpu import calibration
from prereg_kernels.estimate.devices import DEVICES
from prereg_kernels.estimate.estimate import Estimate
from prereg_kernels.estimate.memory import How, Moment, peak
from prereg_kernels.estimate.settings import DTYPES

HOWS = ("fused", "eager")
SHARDED = ("fsdp", "zero3")
FLOPS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def describe(found: Estimate) -> str:
    """A page for a terminal."""
    settings = found.settings
    peaks = {how: peak(moments) for how, moments in found.moments.items()}
    plain = peaks["none"].total
    added = peaks["fused"].total - plain
    gpus = f"{settings.gpus} {settings.gpu}" + f", {settings.parallel}" * (settings.gpus > 1)
    trains = ", ".join(found.structure.trains)
    memory = f"peak memory of {settings.holder}"
    lines = [
        f"PRe adds {found.time_share:.2%} to the time of a step, {found.flops_share:.2%} to its "
        f"FLOPs and {added / plain:.2%} to the {memory}.",
        "",
        f"{found.structure.name}: {_count(found.structure.parameters())} parameters, "
        f"{_count(found.structure.parameters(found.structure.trains))} of them train ({trains})",
        f"{settings.images} samples a step of {found.visual_tokens} visual and {settings.tokens} "
        f"text tokens, {gpus}{', checkpointing' * settings.checkpointing}; PRe at layer "
        f"{found.head.layer} of {found.structure.layers}, anchor {settings.anchor}",
        "",
        _row("", "without PRe", "PRe adds", "eager PRe adds"),
        _row("time of a step", *(_time(x) for x in _differences(found.seconds))),
        _row("FLOPs", _flops(sum(found.flops.values())), _flops(found.head_flops), "the same"),
        _row(
            memory,
            *(size(x) for x in _differences({how: m.total for how, m in peaks.items()})),
        ),
    ]
    for part, flops in found.flops.items():
        lines.append(_row(f"  FLOPs of the {part}", _flops(flops), "", ""))
    lines += ["", *_peak_lines(found, peaks)]
    for x in found.sent:
        lines.append(
            f"sent by a GPU, {x.kind} of {x.what}: {size(x.bytes)}, and {size(x.pre)} of PRe"
        )
    computes = sum(found.parts.values())
    if (waits := found.seconds["none"] - computes) > 0.01 * computes:
        lines.append(
            f"of a step without PRe, a GPU computes for {_time(computes)} and waits for the "
            f"network for {_time(waits)}"
        )
    lines.append(_error_line(found))
    return "\n".join(lines)


def short(found: Estimate, how: How = "fused", times: int = 1) -> str:
    """A line: time and memory of a step, of so many equal parts."""
    highest = peak(found.moments[how])
    share = f", of which PRe {found.time_share:.2%}" if how != "none" else ""
    error = ""
    if found.error is not None:
        seconds, memory = found.error["seconds"], found.error["bytes"]
        error = f"; 9 of 10 were within {seconds:.0%} and {memory:.0%}"
    return (
        f"{_time(times * found.seconds[how])} a step{share}, and {size(highest.total)} of memory "
        f"at its peak ({_place(highest)}){error}"
    )


def _differences(figures: dict[str, float]) -> tuple[float, ...]:
    return figures["none"], *(figures[how] - figures["none"] for how in HOWS)


def _row(name: str, plain: str, fused: str, eager: str) -> str:
    return f"{name:<26} {plain:>13} {fused:>13} {eager:>15}".rstrip()


def _peak_lines(found: Estimate, peaks: dict[str, Moment]) -> list[str]:
    settings, highest = found.settings, peaks["fused"]
    parts = ", ".join(f"{kind} {size(x)}" for kind, x in highest.bytes.items() if x)
    lines = [f"the peak is in {_place(highest)}: {parts}"]
    tap = next((m for m in found.moments["fused"] if m.place == "PRe"), None)
    if tap is not None:
        lines.append(
            f"PRe's own place, backward of layer {tap.layer}: {size(tap.total)}, "
            f"{size(highest.total - tap.total)} below the peak; scratch "
            f"{size(found.head.scratch)}, and a head of {found.head.parameters:,} parameters"
        )
    device = DEVICES.get(settings.gpu)
    if device is not None and highest.total > 0.92 * device.memory:
        lines.append(
            f"It does not fit: a {settings.gpu} has {size(device.memory)}. Use more GPUs"
            f"{' with --parallel fsdp' * (settings.parallel not in SHARDED)}"
            f"{', --checkpointing' * (not settings.checkpointing)}, or fewer --images-per-step."
        )
    return lines


def _place(moment: Moment) -> str:
    where = f"layer {moment.layer}" if moment.layer else moment.place
    return f"{moment.phase} of {where}" if moment.phase != moment.place else moment.place


def _error_line(found: Estimate) -> str:
    if found.error is None:
        return (
            "how far off these figures are is not known, as no GPU was measured; docs/estimate.md "
            "has the constants"
        )
    dtype = {itemsize: name for name, itemsize in DTYPES.items()}[found.structure.itemsize]
    return (
        f"a CPU is one thread of the {calibration().machine} that was measured, with products of "
        f"{dtype}; its memory is what the process takes beyond what it had before the step\n"
        f"how far off: 9 of 10 steps measured there were within {found.error['seconds']:.0%} of "
        f"the time and {found.error['bytes']:.0%} of the memory, each by the rates of the others. "
        "Another CPU may be several times slower, most of all in bfloat16"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}e9" if number >= 1e8 else f"{number:,}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if abs(seconds) >= 0.1 else f"{1e3 * seconds:.3g} ms"


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"


def _flops(count: float) -> str:
    size, unit = next(((s, u) for s, u in FLOPS if count >= s), FLOPS[-1])
    return f"{count / size:,.4g} {unit}"
