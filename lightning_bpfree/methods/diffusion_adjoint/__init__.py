"""Gradients through the sampler of a diffusion model; every name is imported from the file that has it."""
