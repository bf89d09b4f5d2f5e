"""Tests of the exact proof and of rounding."""
