"""From what members say to what the ensemble says."""
