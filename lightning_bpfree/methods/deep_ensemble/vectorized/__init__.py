"""All members in one evaluation by torch.func.vmap."""
