"""`ngrpo experiment`: a named grid of runs, one CSV of their results, and a table and figures made from it alone."""
