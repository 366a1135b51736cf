"""A world of clips small enough for a CPU: shapes that move, a Wan-format pipeline that often moves them wrongly."""
