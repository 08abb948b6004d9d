"""A different activation for each member, instead of the module's own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bpfree.core.forward_override import ForwardOverride
from lightning_bpfree.methods.deep_ensemble.vectorized.per_member import AtWork, per_member

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "hardswish": nn.Hardswish,
}


def check_activations(activations: Sequence[str], members: int) -> None:
    """Raise ValueError for unknown names, or where members do not divide into groups of equal size."""
    for name in activations:
        if name not in ACTIVATIONS:
            near = difflib.get_close_matches(name, ACTIVATIONS, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"activations: {name!r} is not one of {', '.join(ACTIVATIONS)}.{hint}")
    if members % len(activations):
        raise ValueError(
            f"activations={list(activations)} are {len(activations)} for {members} members: give members a multiple of "
            "their number, so that each activation has equally many."
        )


def activation_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the hidden activations of a module by name: what :data:`ACTIVATIONS` knows, and those of transformers."""
    known = tuple(kind for kind in ACTIVATIONS.values() if isinstance(kind, type))
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, known) or type(part).__module__ == "transformers.activations"
    }


class MemberActivation(ForwardOverride):
    """Computes each member's activation instead of one module's.

    Args:
        module: the activation of the module as the user wrote it.
        activations: one for each member.
        at_work: who is computing.
    """

    rule = "DeepEnsemble"

    def __init__(self, module: nn.Module, activations: Sequence[nn.Module], at_work: AtWork) -> None:
        super().__init__(module)
        self.activations, self.at_work = list(activations), at_work

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activations of the member at work, or of all side by side."""
        if self.at_work.index is None:
            result: Tensor = self.activations[self.at_work.member](x)
            return result
        side_by_side: Tensor = per_member(self._grouped, self.at_work, x)
        return side_by_side

    def _grouped(self, x: Tensor) -> Tensor:
        """Return the activations of ``(M, ...)``, with one call for all members of a kind that stand together."""
        pieces, start = [], 0
        while start < len(x):
            kind = self.activations[start]
            end = next((i for i in range(start, len(x)) if self.activations[i] is not kind), len(x))
            pieces.append(kind(x[start:end]))
            start = end
        return torch.cat(pieces)


class MemberActivations:
    """The overrides of all activations of a module.

    Args:
        module: the module.
        names: the activations, dealt to the members in turn; None leaves the module's own.
        at_work: who is computing, with the number of members.

    Raises:
        MisconfigurationException: for a module without activation modules.
    """

    def __init__(self, module: nn.Module, names: Sequence[str] | None, at_work: AtWork) -> None:
        self.names = names
        self.overrides: dict[str, MemberActivation] = {}
        if names is None:
            return
        kinds = {name: ACTIVATIONS[name]() for name in names}
        self.of_members = [names[group_of(m, at_work.members, len(names))] for m in range(at_work.members)]
        for path, part in activation_modules(module).items():
            own = [kinds[name] for name in self.of_members]
            self.overrides[path] = MemberActivation(part, own, at_work)
        if not self.overrides:
            raise MisconfigurationException(
                f"activations={list(names)}: {type(module).__name__} contains no activation modules to replace (looked "
                f"for {', '.join(ACTIVATIONS)}). Functions such as F.relu in forward() cannot be replaced: write "
                "nn.ReLU() in __init__ and call it."
            )

    def install(self) -> None:
        """Take the places of the module's activations."""
        for override in self.overrides.values():
            override.install()

    def remove(self) -> None:
        """Give the module its own activations back."""
        for override in self.overrides.values():
            override.remove()

    def put_into(self, copy: nn.Module, member: int, prefix: str = "") -> None:
        """Replace the activations of a copy of the module, or of its part ``prefix``, by the member's."""
        for path in self.overrides:
            if prefix and not path.startswith(f"{prefix}."):
                continue
            inside = path[len(prefix) + 1 :] if prefix else path
            owner, _, key = inside.rpartition(".")
            place: Any = copy.get_submodule(owner)
            place._modules[key] = ACTIVATIONS[self.of_members[member]]()


def group_of(member: int, members: int, groups: int) -> int:
    """Return the group of a member: neighbors share one, so that one call computes them side by side.

    Examples:
        >>> [group_of(m, 6, 3) for m in range(6)]
        [0, 0, 1, 1, 2, 2]
    """
    return member * groups // members
