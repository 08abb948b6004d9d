"""A network that uses two of its inputs together, uses three others a little, and ignores two that it carries along."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_bpfree.methods.concept_backprop.concepts import Concept

CONCEPTS = [
    Concept("planted", lambda x, y: x[:, 0] + x[:, 3] > 1),
    Concept("decoy", lambda x, y: x[:, 7] > 0.5),
    Concept("sum", lambda x, y: x[:, 0] + x[:, 3], kind="continuous"),
]


def planted(seed: int = 0, rows: int = 2000, epochs: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a trained network, and its data: eight uniform features, the last two of which do not matter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 8, generator=generator)
    y = torch.sin(3 * (x[:, 0] + x[:, 3] - 1)) + 0.3 * x[:, 1] * x[:, 2] + 0.2 * x[:, 4] - 0.2 * x[:, 5]
    y = y / y.std()
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 40), nn.SELU(), nn.Linear(40, 20), nn.SELU(), nn.Linear(20, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for part in torch.randperm(rows, generator=generator).split(100):
            loss = (net(x[part]).squeeze(1) - y[part]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    torch.set_rng_state(state)
    return net, x, y
