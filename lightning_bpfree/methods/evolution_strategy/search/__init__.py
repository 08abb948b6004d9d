"""Search distributions that learn from the fitness of a population: one file an algorithm, one interface."""
