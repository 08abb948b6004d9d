"""Multi-process training in which ranks exchange a few numbers per step instead of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn

from lightning_bpfree.core.arguments import check_attributes, checked, keywords, unknown
from lightning_bpfree.core.exchange import ScalarExchange
from lightning_bpfree.training.trainer_attributes import callbacks_of
from lightning_bpfree.training.training_rule import TrainingRule

_OF_DDP = [name for name in keywords(DDPStrategy) if name != "self"]


class ScalarSyncStrategy(DDPStrategy, ScalarExchange):
    """Keeps ranks bit-equal by exchanging the ``K`` coefficients of a rule instead of gradients.

    Every rank generates the same random directions from the same seed, so that ``K`` numbers determine the estimate.
    The bytes that a rank sends in a step do not depend on the size of the model. There is no DistributedDataParallel
    wrapper.

    Args:
        split: ``"data"``: each rank measures all directions on its own batch, and the numbers are averaged (two ranks
            are equivalent to one with the union of their batches). ``"directions"``: all ranks see the same batch, and
            each measures its own share of the ``K`` directions; ``"population"`` is the same for a rule whose ``K``
            numbers are the fitness of members.
        **kwargs: see ``lightning.pytorch.strategies.DDPStrategy``; arguments of the wrapper are not allowed.

    Raises:
        ValueError: for an unknown split.
        TypeError: for an unknown keyword, and for arguments of the wrapper.

    Examples:
        >>> strategy = ScalarSyncStrategy(split="directions")
        >>> strategy.split
        'directions'

    References:
        H. Feng et al., "Does Federated Learning Really Need Backpropagation?", 2023, arXiv 2301.12195.
    """

    strategy_name = "bpfree_scalar_sync"

    @checked
    def __init__(self, split: Literal["data", "directions", "population"] = "data", **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in _OF_DDP:  # DDPStrategy would keep it for a wrapper that is never made
                raise TypeError(unknown(type(self).__name__, name, value, ["split", *_OF_DDP]))
        super().__init__(**kwargs)
        self.split = split
        self._bytes_sent = 0

    @property
    def _one_batch(self) -> bool:
        return self.split != "data"

    def setup(self, trainer: pl.Trainer) -> None:
        """Refuse a fit without a rule, since its gradients would never be averaged."""
        check_attributes(self)
        rules = callbacks_of(trainer, TrainingRule)
        if trainer.state.fn == "fit" and not rules:
            raise MisconfigurationException(
                "ScalarSyncStrategy sends no gradients between ranks, and no training rule is among the callbacks: the "
                "ranks would drift apart. Add a rule such as ZerothOrder(), or use strategy='ddp'."
            )
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Copy rank 0's parameters and buffers to all ranks, as DDP does; there is no wrapper."""
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of the samplers that Lightning creates: one batch for all ranks unless data is split."""
        return {"num_replicas": 1, "rank": 0} if self._one_batch else super().distributed_sampler_kwargs

    def share(self, num: int) -> Sequence[int]:
        """Return the directions that this rank measures."""
        return range(self.global_rank, num, self.world_size) if self._one_batch else range(num)

    def agree(self, values: Tensor, num: int) -> Tensor:
        """Return the mean over ranks, or the numbers of all shares; gathered, so that all ranks add in one order."""
        largest = -(-num // self.world_size) if self._one_batch else num
        sent = torch.zeros(largest, dtype=torch.float32, device=self.root_device)
        sent[: len(values)] = values
        received = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(received, sent)
        self._bytes_sent += sent.element_size() * largest
        if not self._one_batch:
            return torch.stack(received).mean(0)
        return torch.stack(received, dim=1).flatten()[:num]  # rank r measured r, r + world_size, ...

    def verify(self, module: nn.Module) -> None:
        """Raise RuntimeError if a parameter differs between ranks; give all ranks the buffers of rank 0."""
        own = torch.stack([_fingerprint(parameter.detach()).to(self.root_device) for parameter in module.parameters()])
        received = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(received, own)  # every rank sees the difference and raises, so none waits for another
        strays = [rank for rank, other in enumerate(received) if not torch.equal(other, received[0])]
        if strays:
            raise RuntimeError(
                f"Rank {strays[0]}'s parameters differ from rank 0's: something outside of the rule has changed them "
                "on one rank only, or the ranks run different hardware or versions. Use strategy='ddp'."
            )
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)

    @property
    def bytes_sent(self) -> int:
        """Payload of the coefficients that this rank has sent since the start, in bytes."""
        return self._bytes_sent


def _fingerprint(tensor: Tensor) -> Tensor:
    """Return an integer that changes with any bit, and with the order, of the numbers."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(kinds[tensor.element_size()]).flatten().long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device) * 0x9E3779B97F4A7C1).sum()


if ScalarSyncStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(
        ScalarSyncStrategy.strategy_name,
        ScalarSyncStrategy,
        description="Ranks exchange the coefficients of a training rule, and no gradients.",
    )
