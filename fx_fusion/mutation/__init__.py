"""Mutation testing of graphs, with an oracle that shares nothing with the pass."""
