"""Users' own fusions: a pattern and a replacement, both plain PyTorch functions."""
