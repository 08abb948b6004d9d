"""Changes of discrete inputs: the squares of a board, the tokens of a text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, checked
from lightning_bpfree.methods.concept_backprop.layers import find_layers
from lightning_bpfree.methods.concept_backprop.parameterizations import Parameterization


class _StraightThrough(torch.autograd.Function):
    """The first tensor forward, exactly; the second one's gradient backward."""

    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:  # noqa: ARG004
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, grad


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return ``hard``, with the gradient of ``soft``; sums and differences of the two would round.

    Examples:
        >>> soft = torch.tensor([0.3, 0.7], requires_grad=True)
        >>> straight_through(torch.tensor([0.0, 1.0]), soft).sum().backward()
        >>> soft.grad
        tensor([1., 1.])
    """
    made: Tensor = _StraightThrough.apply(hard, soft)
    return made


class CategoryChange(Parameterization):
    """Chooses a category for every position of one-hot inputs ``(B, K, ...)``, by a straight-through softmax.

    The network always sees one-hot inputs; gradients are those of the softmax. The free numbers are logits.

    Args:
        allowed: booleans ``(K, ...)``, which categories each position may take; None for all. A sample's original
            category is always allowed.
        hold: by how much the logit of the original category leads at the start, > 0.

    Examples:
        >>> board = torch.eye(3)[:, [0, 2]][None]
        >>> change = CategoryChange()
        >>> bool((change.apply(board, change.start(board)) == board).all())
        True
    """

    continuous = False

    @checked
    def __init__(self, allowed: Tensor | None = None, hold: PositiveFloat = 1.0) -> None:
        self.allowed, self.hold = allowed, hold

    def start(self, inputs: Tensor) -> Tensor:
        """Return logits that choose the original categories."""
        one_hot = ((inputs == 0) | (inputs == 1)).all() and (inputs.sum(1) == 1).all()
        if inputs.dim() < 3 or not one_hot:
            raise ValueError(
                f"CategoryChange changes one-hot inputs (B, K, ...), one 1 among K at every position; got "
                f"{tuple(inputs.shape)}. Give every position a category, an empty one too."
            )
        return self.hold * inputs.float()

    def apply(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return one-hot inputs, through which gradients of the softmax flow."""
        if self.allowed is not None:
            free = free.masked_fill(~(self.allowed.to(free.device) | inputs.bool()), -torch.inf)
        soft = free.softmax(1)
        hard = torch.zeros_like(soft).scatter_(1, free.argmax(1, keepdim=True), 1.0)
        return straight_through(hard, soft).to(inputs.dtype)

    def size(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return the number of changed positions, ``(B,)``."""
        return (self.apply(inputs, free) - inputs).abs().flatten(1).sum(1) / 2

    def project(self, inputs: Tensor, free: Tensor) -> None:
        """Keep logits small, so that a chosen category can still change."""
        free.clamp_(-3 * self.hold, 3 * self.hold)


class TokenChange(Parameterization):
    """Chooses a token for every position of token ids ``(B, T)``, by a straight-through softmax over an embedding.

    Args:
        embedding: name of the ``nn.Embedding`` that looks the tokens up.
        allowed: ids that may be inserted; None for all.
        positions: which positions may change; None for all.
        hold: by how much the logit of the original token leads at the start, > 0.
    """

    continuous = False

    @checked
    def __init__(
        self,
        embedding: str,
        allowed: list[int] | None = None,
        positions: list[int] | None = None,
        hold: PositiveFloat = 1.0,
    ) -> None:
        self.embedding, self.allowed, self.positions, self.hold = embedding, allowed, positions, hold
        self._vocabulary = 0

    def bind(self, module: nn.Module) -> None:
        """Find the module's embedding.

        Raises:
            ValueError: if there is no embedding of this name.
        """
        found = find_layers(module, self.embedding)
        part = next(iter(found.values()))
        if not isinstance(part, nn.Embedding):
            raise ValueError(f"embedding={self.embedding!r} is a {type(part).__name__}, not an nn.Embedding.")
        self._vocabulary = part.num_embeddings

    def start(self, inputs: Tensor) -> Tensor:
        """Return logits ``(B, T, V)`` that choose the original tokens."""
        if inputs.dim() != 2 or inputs.is_floating_point():
            raise ValueError(f"TokenChange changes ids of shape (B, T); got {inputs.dtype} of {tuple(inputs.shape)}.")
        return self.hold * self._one_hot(inputs)

    def _one_hot(self, inputs: Tensor) -> Tensor:
        return nn.functional.one_hot(inputs, self._vocabulary).float()

    def _masked(self, inputs: Tensor, free: Tensor) -> Tensor:
        own = self._one_hot(inputs).bool()
        open_ = torch.ones_like(own)
        if self.allowed is not None:
            open_ &= torch.isin(
                torch.arange(self._vocabulary, device=free.device), torch.tensor(self.allowed).to(free.device)
            )
        if self.positions is not None:
            chosen = torch.zeros(inputs.shape[1], dtype=torch.bool, device=free.device)
            chosen[self.positions] = True
            open_ &= chosen[:, None]
        return free.masked_fill(~(open_ | own), -torch.inf)

    def apply(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return the chosen ids; gradients flow through :meth:`attached`."""
        return self._masked(inputs, free).argmax(-1)

    def size(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return the number of changed positions; its gradient is that of the softmax."""
        stay = (self._straight(inputs, free) * self._one_hot(inputs)).sum(-1)
        return (1 - stay).sum(1)

    def _straight(self, inputs: Tensor, free: Tensor) -> Tensor:
        masked = self._masked(inputs, free)
        soft = masked.softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, masked.argmax(-1, keepdim=True), 1.0)
        return straight_through(hard, soft)

    def project(self, inputs: Tensor, free: Tensor) -> None:
        """Keep logits small, so that a chosen token can still change."""
        free.clamp_(-3 * self.hold, 3 * self.hold)

    @contextlib.contextmanager
    def attached(self, module: nn.Module, free: Tensor) -> Iterator[None]:
        """Connect the embedding's output to the free logits."""
        part = next(iter(find_layers(module, self.embedding).values()))

        def looked_up(part: nn.Module, _args: Any, output: Tensor) -> Tensor:
            # The ids are those that `apply` chose; what they were at first does not matter for the gradient.
            soft = free.softmax(-1).to(output.dtype) @ part.get_parameter("weight").to(output.dtype)
            return straight_through(output, soft) if output.shape == soft.shape else output

        handle = part.register_forward_hook(looked_up)
        try:
            yield
        finally:
            handle.remove()
