"""Data, labels and networks on which concept backpropagation is shown."""
