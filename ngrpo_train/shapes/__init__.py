"""A world small enough for a CPU: coloured shapes, a FLUX-format pipeline that draws them, two scorers that judge."""
