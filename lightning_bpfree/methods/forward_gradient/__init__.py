"""Forward gradients: directional derivatives along random directions or local guesses."""
