"""Floor 3: strategies, where the processes themselves talk in another way."""
