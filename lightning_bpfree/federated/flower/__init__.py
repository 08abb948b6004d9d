"""BAFFLE on Flower's Message API: apps for client and server, and the strategy between them."""
