"""``bpfree federate``: trains a module by a federation, in one process or on Flower."""
