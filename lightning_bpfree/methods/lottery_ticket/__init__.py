"""Lottery tickets: prune, rewind and train again within one fit."""
