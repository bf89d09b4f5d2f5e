"""Mutation testing of graphs: what the pass does not refuse, it must rewrite right."""
