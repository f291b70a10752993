# SPDX-License-Identifier: Apache-2.0
"""The directories of runs, and the processes that train in them."""
