"""Local losses: a small classifier at the output of every block, with cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.arguments import AtLeastTwo, PositiveFloat, checked
from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules, made
from lightning_bpfree.core.blocks import Block, Blocks
from lightning_bpfree.core.directions import accumulator_dtype
from lightning_bpfree.core.labels import LabelsOf
from lightning_bpfree.core.params import widen
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.core.step import Step
from lightning_bpfree.methods.forward_gradient.heads import HEADS, HeadKind, MakeHead, Shape

Update = Literal["train", "reset", "freeze"]


class LocalLoss:
    """Describes a local loss for every block of a network: its head, how to cut the network, and how heads learn.

    The loss is the cross-entropy of a small classifier, the head, on the block's output. Heads belong to the rule that
    uses them, and never become part of the user's module.

    Args:
        heads: ``"linear"``, ``"mlp"``, ``"cnn"`` (for maps), or a function ``(output_shape, num_classes) -> nn.Module``
            of the shape of one sample of a block's output. Heads run in evaluation mode, without dropout. They must not
            couple samples.
        blocks: how to cut the network, see :func:`lightning_bpfree.core.blocks.cut`: a number of layers per block, a
            list of numbers, a list of patterns of module names, or a function. Layers after the last block get their
            exact gradient.
        network: name of the network inside the LightningModule, ``""`` for the module itself; None takes the only
            child with parameters.
        update: ``"train"``: heads learn with the exact gradient of their own loss; ``"reset"``: new random heads for
            every batch, never trained (the NTK guess); ``"freeze"``: random heads that never change.
        optimizer: optimizer of the heads, ``"adam"`` or ``"sgd"`` (momentum 0.9).
        lr: learning rate of the heads, > 0.
        num_classes: number of classes, at least 2; None takes the width of the network's output.
        labels: returns the labels of a batch, int64 of shape ``(B,)``; None expects a pair (inputs, labels).

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> LocalLoss("mlp", blocks=["features.*"], update="freeze")
        LocalLoss('mlp', blocks=['features.*'], update='freeze')

    References:
        L. Fournier et al., "Can Forward Gradient Match Backpropagation?", 2023, arXiv 2306.06968. Local heads as in
        E. Belilovsky, M. Eickenberg, E. Oyallon, "Decoupled Greedy Learning of CNNs", 2020, arXiv 1901.08164.
    """

    @checked
    def __init__(
        self,
        heads: HeadKind | MakeHead = "linear",
        blocks: Blocks = 1,
        network: str | None = None,
        update: Update = "train",
        optimizer: Literal["adam", "sgd"] = "adam",
        lr: PositiveFloat = 1e-3,
        num_classes: AtLeastTwo | None = None,
        labels: LabelsOf | None = None,
    ) -> None:
        self.heads, self.blocks, self.network, self.update = heads, blocks, network, update
        self.optimizer, self.lr, self.num_classes, self.labels = optimizer, lr, num_classes, labels

    def __repr__(self) -> str:
        # Loggers and checkpoints store this text.
        default = {"blocks": 1, "network": None, "update": "train", "optimizer": "adam", "lr": 1e-3}
        default |= {"num_classes": None, "labels": None}
        said = [f"{n}={_said(getattr(self, n))}" for n, value in default.items() if getattr(self, n) != value]
        return f"LocalLoss({', '.join([_said(self.heads), *said])})"

    def head(self, shape: Shape, num_classes: int, block: Block) -> nn.Module:
        """Return a new head for a block.

        Args:
            shape: shape of one sample of the block's output.
            num_classes: width of the head's output.
            block: the block; with a 1D convolution, its ``(X, Y)`` means ``X`` channels at ``Y`` positions.
        """
        if callable(self.heads):
            return self.heads(shape, num_classes)
        return HEADS[self.heads](shape, num_classes, channels_first=gives_channels_first(block))


def gives_channels_first(block: Block) -> bool:
    """Whether a block's output ``(B, X, Y)`` is a map of ``X`` channels rather than ``X`` tokens."""
    return any(isinstance(part, nn.Conv1d) for module in block.modules for part in module.modules())


def _said(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)


def sample_losses(head: nn.Module, output: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of every sample, shape ``(B,)``, at least float32.

    Args:
        head: gives logits of shape ``(B, num_classes)``.
        output: of a block, shape ``(B, ...)``.
        labels: int64, shape ``(B,)``.
    """
    return F.cross_entropy(widen(head(widen(output))), labels, reduction="none")


def local_gradients(
    head: nn.Module, output: Tensor, labels: Tensor, sources: Sequence[Tensor], trained: bool
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Return the local losses, and the gradients of their sum for ``sources`` and for the head's parameters.

    Args:
        head: see :func:`sample_losses`.
        output: of a block, with a graph that reaches ``sources``.
        labels: int64, shape ``(B,)``.
        sources: parameters of the block, or ``output`` itself.
        trained: whether the head's gradients are wanted; else that list is empty.
    """
    parameters = list(head.parameters()) if trained else []
    with torch.enable_grad():
        losses = sample_losses(head, output, labels)
        found = torch.autograd.grad(losses.sum(), [*sources, *parameters], allow_unused=True)
    return losses.detach(), list(found[: len(sources)]), list(found[len(sources) :])


class Heads:
    """The heads of one local loss, and their gradients until a batch is known to have succeeded.

    Args:
        loss: what the heads are.
    """

    def __init__(self, loss: LocalLoss) -> None:
        self.loss, self.own = loss, AuxiliaryModules(loss.optimizer, loss.lr)
        self.trained = loss.update == "train"

    def of(
        self, block: Block, build: Callable[[], nn.Module], like: Tensor, seed: int, step: Step
    ) -> tuple[str, nn.Module]:
        """Return key and module of a block's head; one that is reset is a function of the step's seed."""
        key, salt, dtype = f"{block.name}, {_kind(block, like)}", block.name.encode(), accumulator_dtype(like)
        if self.loss.update == "reset":
            return key, made(build, mix(step.seed, *salt), like.device, dtype)
        return key, self.own.get(key, build, mix(seed, *salt), like.device, dtype)

    def keep(self, key: str, gradients: list[Tensor | None], rows: int) -> None:
        """Keep the gradients of a batch of ``rows`` samples."""
        if gradients:
            self.own.propose(key, [None if gradient is None else gradient / rows for gradient in gradients])


def _kind(block: Block, like: Tensor) -> str:
    """Return a key of a block's head; heads take maps of all sizes, and any number of tokens."""
    if like.dim() < 3 or (like.dim() == 3 and not gives_channels_first(block)):
        return str(like.shape[-1])
    return "x".join([str(like.shape[1]), *(str(min(side, 2)) for side in like.shape[2:])])
