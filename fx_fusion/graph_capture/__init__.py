"""What a model needs to be captured in a CUDA or HIP graph."""
