"""The heads of a local loss, while a rule trains with them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_bpfree.core.blocks import Block
from lightning_bpfree.core.directions import accumulator_dtype, mix
from lightning_bpfree.core.step import Step
from lightning_bpfree.nn.local_loss import LocalLoss, gives_channels_first
from lightning_bpfree.rules.own_modules import OwnModules, made


class Heads:
    """The heads of one local loss, and their gradients until a batch is known to have succeeded.

    Args:
        loss: what the heads are.
    """

    def __init__(self, loss: LocalLoss) -> None:
        self.loss, self.own = loss, OwnModules(loss.optimizer, loss.lr)
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
    """Return what tells one head of a block from another: they take maps of all sizes, and any number of tokens."""
    if like.dim() < 3 or (like.dim() == 3 and not gives_channels_first(block)):
        return str(like.shape[-1])
    return "x".join([str(like.shape[1]), *(str(min(side, 2)) for side in like.shape[2:])])
