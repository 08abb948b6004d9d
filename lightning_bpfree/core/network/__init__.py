"""How networks are called, and what they call."""
