"""Layers of other libraries that convert to reversible blocks."""
