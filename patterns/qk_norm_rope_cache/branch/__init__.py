"""Heads of a projection, normalised and rotated: one reader a property."""
