"""Concept backpropagation: linear probes on the layers of a network, and inputs changed until a probe agrees."""
