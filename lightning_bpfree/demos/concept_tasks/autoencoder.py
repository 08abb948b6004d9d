"""A small autoencoder of the inputs, which restricts changed inputs to its outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, PositiveInt, PositiveInts, checked

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """Fully connected encoder and decoder with one hidden layer each, for inputs of a fixed shape.

    Its weights and its training depend on `seed` alone, and do not change the global random stream.

    Args:
        in_shape: Shape of one input.
        latent: Width of the latents, at least 1.
        hidden: Width of the hidden layers, at least 1.
        epochs: Epochs of :meth:`fit`, at least 1.
        lr: Learning rate of Adam in :meth:`fit`, above 0.
        seed: Seed of weights and batches.

    Example:
        >>> model = Autoencoder((1, 8, 8), latent=4)
        >>> model.decode(model.encode(torch.zeros(2, 1, 8, 8))).shape
        torch.Size([2, 1, 8, 8])
    """

    @checked
    def __init__(
        self,
        in_shape: PositiveInts = (1, 8, 8),
        latent: PositiveInt = 16,
        hidden: PositiveInt = 128,
        epochs: PositiveInt = 100,
        lr: PositiveFloat = 2e-3,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.in_shape, self.epochs, self.lr, self.seed = tuple(in_shape), epochs, lr, seed
        width = math.prod(self.in_shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, latent))
            self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def encode(self, inputs: Tensor) -> Tensor:
        """Latents, shape (B, latent)."""
        made: Tensor = self.encoder(inputs.flatten(1))
        return made

    def decode(self, latents: Tensor) -> Tensor:
        """Inputs, shape (B, *in_shape)."""
        made: Tensor = self.decoder(latents)
        return made.reshape(-1, *self.in_shape)

    def forward(self, inputs: Tensor) -> Tensor:
        """Reconstructed inputs, shape (B, *in_shape)."""
        return self.decode(self.encode(inputs))

    def fit(self, inputs: Tensor) -> float:
        """Learn to reconstruct inputs (N, *in_shape); returns the mean squared error of the last epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        data = inputs.detach().clone().to(next(self.parameters()).device)
        mean = math.nan
        with torch.inference_mode(False), torch.enable_grad():
            data = data.clone()
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
            for _ in range(self.epochs):
                losses = []
                for rows in torch.randperm(len(data), generator=generator).split(64):
                    loss = (self(data[rows]) - data[rows]).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.append(float(loss.detach()))
                mean = sum(losses) / len(losses)
            optimizer.zero_grad()
        return mean
