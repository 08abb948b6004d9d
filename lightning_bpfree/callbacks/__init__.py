"""Floor 3: companions of rules."""
