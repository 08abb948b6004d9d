"""Plain backprop through the callback of a training rule: the baseline."""
