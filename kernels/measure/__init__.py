"""Measurements of kernels on this machine, and the file that keeps them."""
