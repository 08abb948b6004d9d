"""Populations of perturbed parameters, and how they are evaluated together."""
