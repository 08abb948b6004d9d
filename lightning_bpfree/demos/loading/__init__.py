"""What data modules share: reading IDX files, and loaders of training, validation and test sets."""
