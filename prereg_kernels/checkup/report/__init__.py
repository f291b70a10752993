# SPDX-License-Identifier: Apache-2.0
"""What the checkup shows: sentences, curves, maps, one page."""
