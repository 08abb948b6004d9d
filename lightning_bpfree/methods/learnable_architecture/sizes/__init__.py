"""Masks with a size, crops, and what they cost."""
