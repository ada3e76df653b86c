"""A run: its configuration, what it opens, the loop, checkpoints, adapters, the term to the base, metrics."""
