"""The fused operation: its reference and its implementations."""
