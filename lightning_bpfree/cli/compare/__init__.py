"""``bpfree compare``: the same module under several rules and seeds."""
