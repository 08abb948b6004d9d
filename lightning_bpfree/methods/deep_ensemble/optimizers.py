"""The user's optimizer for all members: one over stacked parameters if that is equivalent, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_bpfree.methods.deep_ensemble.members import Members

# Whose update of a coordinate depends on that coordinate alone, and whose state is empty before the first step: over a
# stack they do what they do to each member. Subclasses may do anything.
ELEMENTWISE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Rprop,
)


def why_not_stacked(optimizer: Optimizer, lr_factors: Sequence[float]) -> str | None:
    """Return why one optimizer over stacked parameters is not the same as one for each member; None if it is."""
    if type(optimizer) not in ELEMENTWISE:
        return f"{type(optimizer).__name__} is not known to treat each coordinate by itself"
    if len(set(lr_factors)) > 1:
        return "members have learning rates of their own"
    return "it has a state before its first step" if optimizer.state else None


def move_to_stacks(optimizer: Optimizer, members: Members) -> None:
    """Let the user's optimizer update the stacks instead of the module's parameters; groups and options stay.

    Raises:
        MisconfigurationException: if it moves something that is not a parameter of the module.
    """
    stack_of = {id(slot.parameter): members.stack[slot.name] for slot in members.slots}
    for group in optimizer.param_groups:
        group["params"] = _translated(group["params"], stack_of)


def move_to_module(optimizer: Optimizer, members: Members) -> None:
    """Let the optimizer move the module's own parameters again."""
    own = {id(members.stack[slot.name]): slot.parameter for slot in members.slots}
    for group in optimizer.param_groups:
        group["params"] = _translated(group["params"], own)


def _translated(params: Sequence[Tensor], table: Mapping[int, Any]) -> list[Any]:
    if any(id(parameter) not in table for parameter in params):
        raise MisconfigurationException(
            "DeepEnsemble: configure_optimizers() returns an optimizer of tensors that are no parameters of the "
            "module, which no member but the first would have: register them as parameters."
        )
    return [table[id(parameter)] for parameter in params]


class MemberOptimizers(Optimizer):
    """One optimizer for each member, which Lightning sees as one.

    The first is the leader: schedulers are attached to it, and all others take its learning rates and other options
    before each step.

    Args:
        optimizers: optimizers of the members, the leader first.
        lr_factors: by which a member's learning rates differ from the leader's.
    """

    def __init__(self, optimizers: Sequence[Optimizer], lr_factors: Sequence[float]) -> None:
        self.optimizers, self.lr_factors = list(optimizers), list(lr_factors)
        everything = [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]
        super().__init__(everything, {})
        # The groups themselves: who changes a learning rate here, changes it there.
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    @property
    def module_param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the first member, whose parameters are the module's own."""
        return self.optimizers[0].param_groups

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Evaluate the closure once, and let every member take its step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow()
        leader = self.optimizers[0]
        rates = [group["lr"] for group in leader.param_groups if "lr" in group]
        for optimizer, factor in zip(self.optimizers, self.lr_factors, strict=True):
            for group in optimizer.param_groups:
                if factor != 1 and "lr" in group:
                    group["lr"] = group["lr"] * factor
            optimizer.step()
        for group, rate in zip([g for g in leader.param_groups if "lr" in g], rates, strict=True):
            group["lr"] = rate
        return loss

    def _follow(self) -> None:
        for optimizer in self.optimizers[1:]:
            for own, group in zip(optimizer.param_groups, self.optimizers[0].param_groups, strict=True):
                own.update({key: value for key, value in group.items() if key != "params"})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all members."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all members' optimizers."""
        return {"members": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of another number of members.
        """
        states = state_dict.get("members", [])
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint has optimizers of {len(states)} members, this run {len(self.optimizers)}."
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def one_for_each(trainer: pl.Trainer, module: pl.LightningModule, members: Members, factors: Sequence[float]) -> None:
    """Let the Trainer hold one optimizer for each member, all as the user configures them."""
    leader = only_optimizer(trainer)
    optimizers = [leader]
    for member in range(1, members.count):
        with members.at_work(member):
            optimizer = _configured(module)
        own = {id(slot.parameter): members.apart[member][slot.name] for slot in members.slots}
        for group in optimizer.param_groups:
            group["params"] = _translated(group["params"], own)
        # What an optimizer has prepared for its parameters goes along.
        by_module: dict[Tensor, Tensor] = {slot.parameter: members.apart[member][slot.name] for slot in members.slots}
        for parameter in list(optimizer.state):
            optimizer.state[by_module.get(parameter, parameter)] = optimizer.state.pop(parameter)
        optimizers.append(optimizer)
    trainer.strategy.optimizers = [MemberOptimizers(optimizers, factors)]


def only_optimizer(trainer: pl.Trainer) -> Optimizer:
    """Return the Trainer's optimizer.

    Raises:
        MisconfigurationException: for none or several, or one that needs to evaluate the loss again.
    """
    optimizers = trainer.strategy.optimizers
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"DeepEnsemble trains with one optimizer, and configure_optimizers() returns {len(optimizers)}: return "
            "one, with several parameter groups if need be."
        )
    if isinstance(optimizers[0], torch.optim.LBFGS):
        raise MisconfigurationException(
            "DeepEnsemble evaluates each batch once, and LBFGS asks for the loss again and again: choose another "
            "optimizer, such as Adam."
        )
    return optimizers[0]


def _configured(module: pl.LightningModule) -> Optimizer:
    """Return the optimizer in what ``configure_optimizers`` returns, in one of the forms that Lightning takes."""
    found = cast(Any, module.configure_optimizers())
    while not isinstance(found, Optimizer):
        found = found["optimizer"] if isinstance(found, Mapping) else found[0]
    return found
