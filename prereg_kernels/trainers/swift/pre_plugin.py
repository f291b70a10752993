"""What ms-swift's `--external_plugins` is given; `prereg swift-plugin` prints its path."""

from prereg_kernels.trainers.swift import register

register()
