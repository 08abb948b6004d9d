"""An example of a network's inputs: given, the module's own, or from the training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from lightning_bpfree.core.blocks import find_network
from lightning_bpfree.core.network.network_call import LABELS, RefusedError
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.methods.learnable_architecture.tracing.probe import ExampleCall, quiet_evaluation

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Inputs of a network: one tensor, the positional arguments, or keywords."""


def example_call(
    trainer: pl.Trainer, module: pl.LightningModule, network: nn.Module, given: Example | None
) -> ExampleCall:
    """Return a call of the network with one sample.

    Args:
        trainer: the Trainer, whose training data are looked at if nothing else is there.
        module: the module in training.
        network: the network.
        given: inputs of the user's; None to look for them.

    Raises:
        MisconfigurationException: if there are none, or the network cannot be called with them.
    """
    example = given if given is not None else module.example_input_array
    if example is None:
        example = _of_the_data(trainer)
    if isinstance(example, Mapping):
        call = ExampleCall((), {k: v for k, v in example.items() if k not in LABELS})
    else:
        call = ExampleCall(tuple(example) if isinstance(example, list | tuple) else (example,), {})
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    call = ExampleCall(*tree_map_only(Tensor, lambda t: t[:1].to(device), tuple(call)))
    try:
        with quiet_evaluation(network):
            call(network)
    except Exception as error:
        shapes = [tuple(t.shape) for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
        raise MisconfigurationException(
            f"LearnableArchitecture: {type(network).__name__} cannot be evaluated with an example of shapes {shapes}: "
            f"{type(error).__name__}: {error}. Give inputs of the network by example_inputs= (a tensor, a tuple, or a "
            "dict of keywords), or name the part of the module that is the network by network=."
        ) from error
    return call


def network_of(module: pl.LightningModule, name: str | None) -> nn.Module:
    """Return the network whose sizes are learned.

    Args:
        module: the module in training.
        name: of its part; None for the module itself, or for its only child with parameters where it has no forward.

    Raises:
        MisconfigurationException: if there is no such part, or more than one to choose from.
    """
    if name is None and type(module).forward is not pl.LightningModule.forward:
        return module
    try:
        return find_network(module, name)[1]
    except RefusedError as refused:
        raise MisconfigurationException(f"LearnableArchitecture: {refused}") from refused


def _of_the_data(trainer: pl.Trainer) -> Any:
    loader = _loader(trainer)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise MisconfigurationException(
            "LearnableArchitecture needs an example of the network's inputs to find out which layers belong together: "
            "set example_input_array in the module, or give example_inputs=."
        )
    streams = RandomStreams()
    kept = streams.to_plain()
    try:
        first = DataLoader(loader.dataset, batch_size=1, shuffle=False, collate_fn=loader.collate_fn)
        batch = next(iter(first))
    finally:
        streams.from_plain(kept)
    return batch[0] if isinstance(batch, list | tuple) else batch


def _loader(trainer: Any) -> Any:
    source = trainer.fit_loop._data_source
    instance = source.instance
    if instance is not None and source.is_module():
        return getattr(instance, "train_dataloader", lambda: None)()
    if trainer.datamodule is not None:
        return trainer.datamodule.train_dataloader()
    return instance
