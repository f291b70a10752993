"""Writes instructions.json: what each row kernel takes now, counted in SASS.

python -m tests.triton_aot.record
"""

from __future__ import annotations

import json

from tests.triton_aot.compile import TARGETS
from tests.triton_aot.test_aot import NEWEST, OLDEST, RECORD, compile_with, name_of


def main() -> None:
    record = {
        version: {
            target: {
                name_of(kernel): kernel["instructions"]
                for kernel in compile_with(version, "compile", target)
            }
            for target in TARGETS
            if target.startswith("sm_")
        }
        for version in (OLDEST, NEWEST)
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
