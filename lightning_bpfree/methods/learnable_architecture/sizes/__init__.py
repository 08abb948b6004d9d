"""Masks with a learnable size, crops, and their cost."""
