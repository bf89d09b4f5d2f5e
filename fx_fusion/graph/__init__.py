"""One FX graph, read and edited; imports nothing above it."""
