"""Which layers of a network share units, which blocks can be removed, and how both are cropped."""
