"""The Triton kernel's AMD machine code: compiled, inspected and executed without an AMD GPU."""
