"""Search distributions that learn from the fitness of a population: one file per algorithm, one interface."""
