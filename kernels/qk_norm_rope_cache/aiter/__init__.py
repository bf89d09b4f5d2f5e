"""AMD's aiter."""
