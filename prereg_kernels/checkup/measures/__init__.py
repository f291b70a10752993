# SPDX-License-Identifier: Apache-2.0
"""What the checkup measures on hidden states, a file a measure."""
