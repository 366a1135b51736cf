"""A training run: its loop, the checks before any work, checkpoints, figures and warnings."""
