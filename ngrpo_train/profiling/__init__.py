"""Where an iteration's time goes: ranges put around training from outside, a profiler's trace read, tables of both."""
