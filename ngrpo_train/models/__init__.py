"""Models: loaded, measured, adapted, sharded, quantised for rollouts, and written out for diffusers."""
