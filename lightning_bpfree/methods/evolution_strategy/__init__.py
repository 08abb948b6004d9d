"""Evolution strategies: the fitness of a population of perturbed parameters."""
