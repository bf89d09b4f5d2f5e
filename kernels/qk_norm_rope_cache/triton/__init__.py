"""The Triton kernel, for CUDA and ROCm."""
