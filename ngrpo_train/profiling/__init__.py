"""Profiles of an iteration: ranges put around training from outside, a reader of profiler traces, tables of both."""
