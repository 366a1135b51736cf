"""A world small enough for a CPU: signs with a word on them, a FLUX-format pipeline that misspells, and its judges."""
