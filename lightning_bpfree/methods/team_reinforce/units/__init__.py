"""Stochastic units, and how the units of a layer explore together."""
