"""Building blocks that two or more methods share. They need only torch."""
