"""What ``python -m fx_fusion`` can do, one command a module."""
