"""Reversible recomputation: stacks of reversible blocks recompute their inputs from their outputs."""
