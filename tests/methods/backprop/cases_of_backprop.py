"""Backprop as a rule, for the properties of every rule."""

from lightning_bpfree import Backprop

RULES = {"backprop": Backprop}
RANKS = {"backprop": Backprop}
