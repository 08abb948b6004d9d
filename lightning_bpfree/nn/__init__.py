"""Floor 1: small modules that rules bring along, and the losses that they are trained by."""
