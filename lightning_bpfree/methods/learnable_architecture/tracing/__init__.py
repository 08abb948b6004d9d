"""Which layers of a network share units, which blocks can be left out, and how both are cropped."""
