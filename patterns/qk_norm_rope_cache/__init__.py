"""split → rmsnorm → mrope → cache-store: found, read, proved and lowered to one call."""
