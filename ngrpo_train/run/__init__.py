"""A training run: the loop, what it looks at before any work, checkpoints, figures and warnings."""
