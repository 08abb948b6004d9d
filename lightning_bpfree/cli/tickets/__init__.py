"""``bpfree tickets``: studies of lottery tickets."""
