"""The update, from explored states to new weights: rows, policies, the optimizer and the average of the weights."""
