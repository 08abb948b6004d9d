"""Builders of reversible models, and a multiscale vision transformer."""
