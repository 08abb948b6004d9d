"""Widths, depth, kernel sizes and resolutions learned by gradient, under a budget (DNArch)."""
