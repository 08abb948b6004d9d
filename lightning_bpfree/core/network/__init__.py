"""Calls of networks, and functions that networks call."""
