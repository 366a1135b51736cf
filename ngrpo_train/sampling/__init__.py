"""Sampling, from noise to pictures: initial noises, solvers, rollouts and evaluations."""
