"""Floor 0: what a training rule is made of. Needs torch only."""
