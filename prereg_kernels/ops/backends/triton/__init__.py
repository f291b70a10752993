"""Triton kernels, one file each. Importing any but `config` imports triton."""
