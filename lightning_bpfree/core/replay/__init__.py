"""Evaluating a training step several times as if it had been evaluated once."""
