"""A diffusion model of digits, and rewards that fine-tune it."""
