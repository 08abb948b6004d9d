"""Federated learning by forward passes: clients answer with loss differences, the server makes the gradient of them."""
