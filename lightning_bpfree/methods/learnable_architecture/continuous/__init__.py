"""Continuous convolutions, Fourier crops, and the CCNN."""
