"""Plug-ins for serving engines. Each package is imported only where its engine is."""
