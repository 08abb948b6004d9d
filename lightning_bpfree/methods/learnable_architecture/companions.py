"""Callbacks that ``LearnableArchitecture`` refuses to be combined with, and why."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_bpfree.training.trainer_attributes import callbacks_of

_WITH = "Backprop, ForwardGradient and ZerothOrder go with it"
_REFUSED = {
    "LotteryTicket": "prunes and rewinds weights whose shapes this one changes: search first, then prune the export",
    "DeepEnsemble": "trains members whose sizes would differ: search one network, then make an ensemble of the export",
    "ReversibleRecompute": "recomputes blocks of one width, which this one crops: search first, and convert the export",
    "ForwardForward": f"trains each block by a loss of its own, so that no gradient says what a size is worth; {_WITH}",
    "TeamReinforce": f"trains layers by rewards, so that no gradient says what a size is worth; {_WITH}",
    "DirectFeedbackAlignment": f"has feedback matrices of fixed shapes, which do not fit cropped layers; {_WITH}",
    "EvolutionStrategy": f"evaluates a population in stacked tensors, past the layers that are cropped; {_WITH}",
    "StochasticWeightAveraging": "averages networks of different sizes: use it in a fit of the export",
    "WeightAveraging": "averages networks of different sizes: use it in a fit of the export",
    "BaseFinetuning": "adds parameters to the user's optimizer later, and the sizes among them",
    "ModelPruning": "reparametrizes weights that this one crops: prune the export",
}


def check_companions(trainer: pl.Trainer, own: Callback) -> None:
    """Raise MisconfigurationException for callbacks that are incompatible with this one.

    Args:
        trainer: the Trainer.
        own: the callback that owns the sizes.
    """
    for callback in callbacks_of(trainer, Callback):
        if callback is own:
            continue
        if isinstance(callback, type(own)):
            raise MisconfigurationException(
                "LearnableArchitecture: two callbacks own the sizes of one module. Give one of them all dims, or use "
                "one after the other on the export."
            )
        for kind in type(callback).__mro__:
            if kind.__name__ in _REFUSED:
                raise MisconfigurationException(
                    f"LearnableArchitecture beside {type(callback).__name__}, which {_REFUSED[kind.__name__]}."
                )


def check_optimization(module: pl.LightningModule) -> None:
    """Raise MisconfigurationException for manual optimization: there is no one step to which sizes belong."""
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "LearnableArchitecture needs automatic optimization: with manual optimization nothing says which step of "
            "which optimizer the sizes go with. Set automatic_optimization = True."
        )


@contextlib.contextmanager
def _hidden(parameters: Sequence[nn.Parameter], module: nn.Module) -> Iterator[None]:
    ids = {id(parameter) for parameter in parameters}
    kept = []
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if id(parameter) in ids:
                kept.append((owner, name, parameter))
                del owner._parameters[name]
    try:
        yield
    finally:
        for owner, name, parameter in kept:
            owner._parameters[name] = parameter


class OptimizersWithoutSizes:
    """Stands in for ``configure_optimizers``: the user's optimizers do not see the sizes, which have their own.

    Args:
        module: the module.
        parameters: the sizes.
    """

    def __init__(self, module: pl.LightningModule, parameters: Sequence[nn.Parameter]) -> None:
        self.module = module
        own = module.configure_optimizers

        @functools.wraps(own)
        def configure() -> Any:
            with _hidden(parameters, module):
                return own()

        module.__dict__["configure_optimizers"] = configure

    def remove(self) -> None:
        """Give the module its own method back."""
        self.module.__dict__.pop("configure_optimizers", None)
