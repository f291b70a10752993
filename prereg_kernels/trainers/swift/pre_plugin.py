# SPDX-License-Identifier: Apache-2.0
"""What ms-swift's `external_plugins` is given; `prereg swift-plugin` prints its path.

ms-swift puts the folder of this file first on `sys.path`: no module in it may have another's name.
"""

from prereg_kernels.trainers.swift import register

register()
