"""Processes and devices: who takes part, what is sharded, recomputed and compiled, and which attention computes."""
