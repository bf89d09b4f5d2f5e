"""Launches of the fused operation for every kernel's tests: their tensors, what they should give, and the checks."""
