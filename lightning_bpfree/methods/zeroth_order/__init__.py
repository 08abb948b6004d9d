"""Zeroth order: finite differences of the loss along random directions."""
