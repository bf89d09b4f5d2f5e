"""Opaque operations, in whose place stands what they are declared to compute while fusions look at a graph."""
