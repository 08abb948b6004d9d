"""The update from the clients' numbers to the next weights, identical on the server and on synchronized clients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.federated.settings import Baffle

_NUMBER = ":number"  # marks what was no tensor
Numbers = Mapping[int | None, tuple[float, Tensor]]
"""By client: its share, and its differences ``(local_steps, K)``. The key None stands for all clients together."""


def aggregated_gradient(params: Mapping[str, Tensor], settings: Baffle, seed: int, numbers: Numbers) -> Params:
    """Return the gradient estimate from the clients' numbers, before clipping.

    With several local steps, it is the sum of the steps' estimates.

    Args:
        params: the parameters.
        settings: the federation's settings.
        seed: seed of the round.
        numbers: with ``noise="shared"``, only the weighted mean of all clients is used.

    Examples:
        >>> settings = Baffle(num_directions=1, sigma=0.5, clip=None)
        >>> params = {"w": torch.zeros(2)}
        >>> gradient = aggregated_gradient(params, settings, 3, {None: (1.0, torch.tensor([[2.0]]))})
        >>> torch.allclose(gradient["w"], 2.0 / 0.5 * settings.drawn(params, 3)[0]["w"])
        True
    """
    if settings.noise == "shared":
        mean = sum((share * rows for share, rows in numbers.values()), start=torch.zeros(()))
        numbers = {None: (1.0, mean)}
    total: Params = {}
    for client, (share, rows) in numbers.items():
        for step, row in enumerate(rows):
            weights = row.double() * (share / (settings.sigma * settings.num_directions))
            for name, part in settings.drawn(params, seed, step, client).combine(weights).items():
                total[name] = total[name].add_(part) if name in total else part
    return total


def clipped(gradient: Params, largest: float | None) -> Params:
    """Scale a gradient as a whole, in place, so that no absolute coordinate exceeds ``largest``; return it."""
    peak = max(float(part.abs().max()) if part.numel() else 0.0 for part in gradient.values())
    if largest is not None and peak > largest:
        for part in gradient.values():
            part.mul_(largest / peak)
    return gradient


class OptimizerSteps:
    """Steps the module's own optimizer with gradients computed elsewhere.

    Args:
        module: has one optimizer from ``configure_optimizers``; its schedulers step once per round.

    Raises:
        ValueError: if the module has several optimizers, or they cannot be created without a Trainer.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.optimizer, self.schedulers = configured_optimizer(module)

    def step(self) -> None:
        """Step optimizer and schedulers with the parameters' gradients, and clear these."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer and schedulers."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    def tensors(self) -> Params:
        """Return the optimizer's state as named tensors; together with the update count, it is complete."""
        found: Params = {}
        for index, own in self.optimizer.state_dict()["state"].items():
            for name, value in own.items():
                if isinstance(value, Tensor):
                    found[f"{index}.{name}"] = value.detach().clone()
                elif value is not None:
                    found[f"{index}.{name}{_NUMBER}"] = torch.tensor(float(value), dtype=torch.float64)
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Continue from the state of another optimizer.

        Args:
            tensors: the result of the other's :meth:`tensors`.
            updates: the number of its updates; schedulers advance by as many steps.
        """
        self.optimizer, self.schedulers = configured_optimizer(self.module)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # before the optimizer's first step
            for _ in range(updates):
                for scheduler in self.schedulers:
                    scheduler.step()
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            number = name.endswith(_NUMBER)
            state.setdefault(int(index), {})[name.removesuffix(_NUMBER)] = float(value) if number else value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        for scheduler, own in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(own)


class ServerUpdate(OptimizerSteps):
    """Computes the estimate of a round, and steps the module's own optimizer with it.

    Args:
        module: see :class:`OptimizerSteps`.
        settings: the federation's settings.
    """

    def __init__(self, module: pl.LightningModule, settings: Baffle) -> None:
        super().__init__(module)
        self.settings, self.grad_norm = settings, 0.0

    def apply(self, seed: int, numbers: Numbers) -> None:
        """Apply the update of a round.

        Args:
            seed: seed of the round.
            numbers: the numbers of its clients; shares add up to 1.
        """
        params = {slot.name: slot.parameter for slot in ParameterSlots(self.module).trainable()}
        detached = {name: param.detach() for name, param in params.items()}
        gradient = clipped(aggregated_gradient(detached, self.settings, seed, numbers), self.settings.clip)
        self.grad_norm = float(torch.stack([part.double().square().sum() for part in gradient.values()]).sum().sqrt())
        for name, param in params.items():
            param.grad = gradient.pop(name)
        self.step()


def configured_optimizer(module: pl.LightningModule) -> tuple[torch.optim.Optimizer, list[Any]]:
    """Return the module's optimizer and its schedulers.

    Raises:
        ValueError: if there is none, or more than one, or ``configure_optimizers`` needs a Trainer.
    """
    name = type(module).__name__
    try:
        made: Any = module.configure_optimizers()
    except RuntimeError as error:
        if "trainer" not in str(error).lower():
            raise
        raise ValueError(
            f"module={name}: configure_optimizers needs a Trainer, and a federation has none: choose a schedule that "
            "does not depend on the length of a fit."
        ) from error
    optimizers, schedulers = _parts(made)
    if len(optimizers) != 1:
        raise ValueError(
            f"module={name}: configure_optimizers returned {len(optimizers)} optimizers: a federation steps one, "
            "with the estimate for all trained parameters."
        )
    return optimizers[0], [entry["scheduler"] if isinstance(entry, dict) else entry for entry in schedulers]


def _parts(made: Any) -> tuple[list[Any], list[Any]]:
    if made is None:
        return [], []
    if isinstance(made, torch.optim.Optimizer):
        return [made], []
    if isinstance(made, Mapping):
        return [made["optimizer"]], [made["lr_scheduler"]] if "lr_scheduler" in made else []
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], list):
        return list(made[0]), list(made[1])
    parts = [_parts(entry) for entry in made]
    return [o for optimizers, _ in parts for o in optimizers], [s for _, own in parts for s in own]
