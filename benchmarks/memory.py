"""The peak memory of one step, beyond the inputs: `python -m benchmarks.memory NAME N D DTYPE`.

A process of its own for each measurement: the peak resident size never goes down again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

from benchmarks.implementations import Size, make_step
from prereg_kernels.demo.runs.memory import peak_memory


def peak_bytes(name: str, size: Size) -> int:
    """Peak memory of one step of an implementation, measured in a fresh process."""
    dtype = str(size.dtype).removeprefix("torch.")
    arguments = [name, str(size.tokens), str(size.width), dtype]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(name: str, tokens: str, width: str, dtype: str) -> None:
    """Print the growth of the peak: a small step warms up first, so libraries are not counted."""
    torch.set_num_threads(1)  # each thread of a matmul library brings buffers of its own
    kind = getattr(torch, dtype)
    make_step(name, Size(16, 16, kind))()
    step = make_step(name, Size(int(tokens), int(width), kind))
    before = peak_memory()
    step()
    print(peak_memory() - before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    for argument in ("name", "tokens", "width", "dtype"):
        parser.add_argument(argument)
    main(**vars(parser.parse_args()))
