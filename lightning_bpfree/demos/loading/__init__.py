"""Shared parts of data modules: reading IDX files, and loaders of training, validation and test sets."""
