# SPDX-License-Identifier: Apache-2.0
"""What every part may use. Nothing here imports another part of the package."""
