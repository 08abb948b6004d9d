"""Federated learning by forward passes: the server estimates the gradient from the clients' loss differences."""
