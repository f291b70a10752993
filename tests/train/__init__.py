"""Tests of prereg_kernels.train."""
