"""Types, errors, registry and JSON codec: the layer that knows no other."""
