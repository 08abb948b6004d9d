"""Floor 2: training rules, one file each, over one base."""
