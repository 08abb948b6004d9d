"""A module's training step over a client's batches, as a function of the parameters."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_bpfree.core.forward_ad import plain_attention
from lightning_bpfree.core.params import ParameterSlots, Params, widen
from lightning_bpfree.core.replay.batch import BatchCopies
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.core.step import Step, loss_of
from lightning_bpfree.federated.normalization import check_no_batch_norm
from lightning_bpfree.federated.settings import tensor_digest
from lightning_bpfree.training.module_state import ModuleState

Batches = Sequence[tuple[Any, int]]


class Objective:
    """The mean loss over some batches, with the same random numbers, buffers and batches in every evaluation.

    Args:
        steps: a step for each batch.
        sizes: the number of samples in each.
        layerwise: whether parameters are used only by their own layers; None if not checked.
    """

    def __init__(self, steps: Sequence[Step], sizes: Sequence[int], layerwise: bool | None = None) -> None:
        self.steps, self.num_samples, self.layerwise = list(steps), sum(sizes), layerwise
        self._shares = [size / self.num_samples for size in sizes]

    @property
    def slots(self) -> ParameterSlots:
        """The parameters with their places in the module."""
        return self.steps[0].slots

    def __call__(self, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss at ``params``, a scalar; at the module's own for None. Leaves no trace."""
        total: Tensor | None = None
        for step, share in zip(self.steps, self._shares, strict=True):
            part = widen(step.loss(params, recorded=False)) * share
            total = part if total is None else total + part
        assert total is not None
        return total

    def stacked(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the losses at several parameters in one vectorized pass.

        Args:
            params: named tensors of shape ``(C, *shape)``.
        """

        def loss_of(own: Params) -> Tensor:
            parts = [
                widen(step.loss_under_transform(own)) * s for step, s in zip(self.steps, self._shares, strict=True)
            ]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total

        for step in self.steps:
            step.rewind()
        with plain_attention():
            losses: Tensor = vmap(loss_of, randomness="same")(dict(params))
        num = len(next(iter(params.values())))
        for step in self.steps:
            step.forward_evals += num
        return losses

    def finish(self) -> None:
        """Restore random streams and all other state from before the first evaluation."""
        for step in self.steps:
            step.finish()


class AsGiven(BatchCopies):
    """A batch that is passed without a copy: the training step does not write to it, and a copy costs memory."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args, self.kwargs, self.always = args, {}, False

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments."""
        return self.args, self.kwargs

    def original(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments."""
        return self.args, self.kwargs


class LocalLoss:
    """Evaluates a module's training step without a Trainer, a graph, or side effects.

    Args:
        module: any LightningModule without BatchNorm.

    Raises:
        ValueError: if the module has a BatchNorm layer.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        check_no_batch_norm(module)
        self.module, self.state = module, ModuleState(module, None)
        self._rehearsed = False
        self._layerwise: bool | None = None
        self._takes_index = "batch_idx" in inspect.signature(module.training_step).parameters

    @property
    def params(self) -> Params:
        """The trained parameters, detached, by name."""
        return {slot.name: slot.parameter.detach() for slot in self.state.slots.trainable()}

    @property
    def frozen(self) -> Params:
        """The parameters that are not trained."""
        trained = set(self.params)
        return {slot.name: slot.parameter.detach() for slot in self.state.slots if slot.name not in trained}

    def args(self, batch: Any) -> tuple[Any, ...]:
        """Return the arguments of the training step for a batch."""
        batch = move_data_to_device(batch, self.module.device)
        return (batch, 0) if self._takes_index else (batch,)

    def evaluate(self, *args: Any) -> Any:
        """Return the output of the training step."""
        return self.module.training_step(*args)

    @contextlib.contextmanager
    def on(self, batches: Batches, seed: int) -> Iterator[Objective]:
        """Return a context in which the loss over ``batches`` can be evaluated.

        Args:
            batches: the batches with their numbers of samples.
            seed: seed of the random numbers that the training step draws.
        """
        with own_randomness(seed, self.module.device), torch.no_grad():
            self._look(batches)
            steps = [self._step(batch) for batch, _ in batches]
            objective = Objective(steps, [size for _, size in batches], self._layerwise)
            try:
                yield objective
            finally:
                self._layerwise = objective.layerwise
                objective.finish()

    def per_sample(self, batch: Any, params: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of every sample at several parameters, shape ``(C, B)``, in one vectorized pass.

        Args:
            batch: tensors with samples along their first dimension, in lists, tuples and dicts.
            params: named tensors of shape ``(C, *shape)``.
        """
        leaves, shape = tree_flatten(self.args(batch)[0])

        def loss_at(own: Params, *sample: Tensor) -> Tensor:
            one = tree_unflatten([leaf.unsqueeze(0) for leaf in sample], shape)
            with self.state.slots.replaced(own), self.state.quiet():
                return widen(loss_of(self.evaluate(*self.args(one))))

        replay = self.state.replay()
        replay.rewind()
        try:
            with plain_attention(), replay.buffers.copies():
                over_samples = vmap(loss_at, in_dims=(None, *[0] * len(leaves)), randomness="different")
                losses: Tensor = vmap(over_samples, in_dims=(0, *[None] * len(leaves)), randomness="same")(
                    dict(params), *leaves
                )
        finally:
            replay.finish()
        return losses

    def _step(self, batch: Any) -> Step:
        args = self.args(batch)
        return Step(
            self.module,
            self.evaluate,
            self.state.slots,
            0,
            args=args,
            replay=self.state.replay(),
            copies=BatchCopies(args, None, True) if self.state.writes_batch else AsGiven(args),
            needs_graph=self.state.needs_graph,
            quiet=self.state.quiet,
        )

    def _look(self, batches: Batches) -> None:
        """Find out, once, what the training step writes to."""
        if self._rehearsed or not batches:
            return
        # A client runs in a process of its own for every round, so that this look is part of each: hashes, not copies.
        before = {name: tensor_digest(param) for name, param in self.params.items()}
        self.state.rehearse(self.evaluate, BatchCopies(self.args(batches[0][0])), copied=False)
        moved = [name for name, param in self.params.items() if before[name] != tensor_digest(param)]
        written = sorted({*moved, *self.state.written_and_trained()})
        if written:
            raise ValueError(
                f"training_step writes to {', '.join(written)}, which are trained: move that to a hook of the client."
            )
        self._rehearsed = True


@contextlib.contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the streams of torch and Python in this context, and restore the caller's streams after it."""
    streams = RandomStreams([device])
    before = streams.save()
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        streams.load(before)


def evaluated_along(
    objective: Objective,
    params: Mapping[str, Tensor],
    stack: Callable[[Sequence[int]], Params],
    num: int,
    chunk_size: int,
) -> Tensor:
    """Return the losses at ``num`` perturbed parameters, ``chunk_size`` per vectorized pass, ``(num,)`` in float64.

    Args:
        objective: the loss.
        params: the parameters to perturb.
        stack: indices -> perturbations, ``(len, *shape)`` for each name; they are overwritten.
        num: number of perturbations.
        chunk_size: at least 1.
    """
    found = []
    for start in range(0, num, chunk_size):
        moved = stack(range(start, min(start + chunk_size, num)))
        for name, param in params.items():
            moved[name].add_(param)
        found.append(objective.stacked(moved).double())
    return torch.cat(found)
