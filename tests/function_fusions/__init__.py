"""Tests of fusions that users register."""
