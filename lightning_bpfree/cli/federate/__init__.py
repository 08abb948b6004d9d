"""``bpfree federate``: trains a module in a federation, in one process or on Flower."""
