"""Combination of members' outputs into those of the ensemble."""
