"""SwiGLU: the operation and its Triton kernel."""
