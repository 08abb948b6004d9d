"""The cost of training: time and memory."""
