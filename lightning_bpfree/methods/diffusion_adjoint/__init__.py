"""Gradients through the sampler of a diffusion model; import every name from the file that defines it."""
