# SPDX-License-Identifier: Apache-2.0
"""PRe in the real trainers, each started by its own command, in the versions that it pins.

A package lies beside the environment, in .packages/NAME, as `make .packages/NAME/.ready` puts it
there from NAME.txt, and the `make test-NAME` targets run these tests.
"""
