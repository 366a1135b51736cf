"""`ngrpo experiment`: a named grid of runs, one CSV of what they gave, and a table and figures made from it alone."""
