"""The activations of a network that become stochastic units."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from torch import nn

from lightning_bpfree.core.arguments import Name, NonEmpty
from lightning_bpfree.core.network.functional_activations import as_modules
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.methods.team_reinforce.units.stochastic import StochasticUnit

Units = Name | type[nn.Module] | Annotated[Sequence[Name | type[nn.Module]], NonEmpty()]

# Elementwise functions without parameters, which `units=None` takes.
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
)

TRANSFORMERS = "transformers.activations"  # whose activations are of classes of their own


def find_sites(network: nn.Module, prefix: str, units: Units | None) -> dict[str, nn.Module]:
    """Return names and modules of the activations whose place stochastic units take.

    Args:
        network: the network.
        prefix: its name in the user's module; ``""`` if it is that module.
        units: shell-style patterns of names in the user's module (``"net.*.act"``), types (``nn.ReLU``) or their names
            (``"ReLU"``), or several of them; None for the network's own stochastic units, or else for all activations
            of a known type.

    Raises:
        ValueError: if one of them matches nothing, or a module with parameters; the message lists what is there.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> list(find_sites(net, "net", nn.ReLU)), list(find_sites(net, "net", "net.[13]"))
        (['net.1'], ['net.1', 'net.3'])
    """
    start = f"{prefix}." if prefix else ""
    names = {start + name: module for name, module in network.named_modules() if name}
    if units is None:
        kinds: list[tuple[type[nn.Module], ...]] = [(StochasticUnit,), ACTIVATIONS]
        several = [{name: module for name, module in names.items() if isinstance(module, kind)} for kind in kinds]
        several[1] = {n: m for n, m in names.items() if n in several[1] or type(m).__module__ == TRANSFORMERS}
        found = several[0] or several[1]
        if not found:
            raise RefusedError(
                f"units: {type(network).__name__} has no activation that is a module, and functions cannot be "
                f"replaced. {as_modules(network)} Or name other modules, units=.... {_listing(names)}"
            )
        return found
    wanted = [units] if isinstance(units, str | type) else list(units)
    chosen: dict[str, nn.Module] = {}
    for entry in wanted:
        chosen.update(_matching(names, entry))
    for name, module in chosen.items():
        if any(True for _ in module.parameters()):
            raise RefusedError(
                f"units: {name} ({type(module).__name__}) has parameters, which would no longer be trained. Name the "
                f"activation after it. {_listing(names)}"
            )
    return {name: module for name, module in names.items() if name in chosen}


def _matching(names: dict[str, nn.Module], entry: str | type[nn.Module]) -> dict[str, nn.Module]:
    if isinstance(entry, type):
        found = {name: module for name, module in names.items() if isinstance(module, entry)}
        shown = entry.__name__
    else:
        kind = entry.rpartition(".")[2]
        found = {name: module for name, module in names.items() if fnmatchcase(name, entry)}
        if not found and kind.isidentifier():
            found = {name: module for name, module in names.items() if type(module).__name__ == kind}
        shown = repr(entry)
    if not found:
        near = difflib.get_close_matches(str(shown).strip("'"), list(names), n=3, cutoff=0.0)
        raise RefusedError(
            f"units={shown} matches no module of the network; nearest names: {', '.join(near) or 'none'}. Patterns are "
            f"shell-style, in the whole module: 'net.*.act'; types are given as nn.ReLU or 'ReLU'. {_listing(names)}"
        )
    return found


def _listing(names: dict[str, nn.Module]) -> str:
    plain = [
        f"{name} ({type(module).__name__})"
        for name, module in names.items()
        if not any(True for _ in module.parameters()) and not list(module.children())
    ]
    shown = ", ".join(plain[:30])
    return f"Modules without parameters: {shown or 'none'}{', ...' if len(plain) > 30 else ''}."
