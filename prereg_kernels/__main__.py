# SPDX-License-Identifier: Apache-2.0
"""`python -m prereg_kernels` is the command line."""

from prereg_kernels.cli import main

if __name__ == "__main__":
    main()
