# SPDX-License-Identifier: Apache-2.0
"""`prereg train` with Liger's real forward, its Triton functions torch's: `python -m ... CONFIG`.

Its last line says how many losses were Liger's.
"""

from __future__ import annotations

import sys
from typing import Any

from prereg_kernels.cli.commands import main
from tests.packages.liger_run import put_torch_in_place

if __name__ == "__main__":
    from liger_kernel.transformers.model import loss_utils

    put_torch_in_place()
    functions: Any = loss_utils.F
    compute, losses = functions.liger_fused_linear_cross_entropy, list[None]()

    def count(*args: Any, **kwargs: Any) -> Any:
        losses.append(None)
        return compute(*args, **kwargs)

    functions.liger_fused_linear_cross_entropy = count
    sys.argv[1:1] = ["train"]
    main()
    print(f"Liger's losses: {len(losses)}")
