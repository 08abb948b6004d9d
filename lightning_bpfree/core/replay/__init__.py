"""Repeated evaluation of a training step with the side effects of a single one."""
