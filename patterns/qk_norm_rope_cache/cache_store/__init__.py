"""What is stored where in a KV cache: one reader a property."""
