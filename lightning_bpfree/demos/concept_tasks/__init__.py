"""Data, labels and networks that demonstrate concept backpropagation."""
