# SPDX-License-Identifier: Apache-2.0
"""Writes instructions.json: what each row kernel takes now, counted in SASS.

    python -m tests.triton_aot.record

It writes after each version and target.
"""

from __future__ import annotations

import json

from tests.triton_aot.compile import TARGETS
from tests.triton_aot.test_aot import NEWEST, OLDEST, RECORD, compile_with, name_of


def main() -> None:
    record: dict[str, dict[str, dict[str, int]]] = {NEWEST: {}, OLDEST: {}}
    for version, targets in record.items():
        for target in ("sm_90", "sm_80", "sm_100"):
            assert target in TARGETS
            kernels = compile_with(version, "compile", target)
            targets[target] = {name_of(kernel): kernel["instructions"] for kernel in kernels}
            RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
