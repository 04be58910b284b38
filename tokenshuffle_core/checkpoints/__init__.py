"""Checkpoints that others published, of these families, as our own."""

FAMILIES = ("llamagen", "janus", "llama", "vq")
