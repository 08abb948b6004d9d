"""Cutting a module into an ordered list of blocks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, NamedTuple

from torch import nn

from lightning_bpfree.core.arguments import NonEmpty, Patterns, PositiveInt, checked
from lightning_bpfree.core.network.functional_activations import as_modules, functional_lines
from lightning_bpfree.core.network.network_call import RefusedError

Blocks = (
    PositiveInt
    | Annotated[Sequence[PositiveInt], NonEmpty()]
    | Annotated[Sequence[Patterns], NonEmpty()]
    | Callable[[nn.Module], Sequence[Sequence[nn.Module]]]
)


class Block(NamedTuple):
    """Consecutive layers of a network.

    Args:
        name: names of the first and the last layer.
        modules: the layers in the order in which they run; the input of the first is the block's input, the output of
            the last is the block's output.
        parameters: those of the layers and those named explicitly, each once.
    """

    name: str
    modules: list[nn.Module]
    parameters: list[nn.Parameter]


class Cut(NamedTuple):
    """A network in blocks.

    Args:
        blocks: in the order in which they run.
        rest: parameters that belong to no block, by name; those of the last layer if the cut was automatic.
    """

    blocks: list[Block]
    rest: dict[str, nn.Parameter]


@checked
def cut(network: nn.Module, blocks: Blocks = 1) -> Cut:
    """Cut ``network`` into blocks.

    Args:
        network: any module.
        blocks: how to cut.

            - ``n``, a number of at least 1: every ``n`` layers of an ``nn.Sequential`` are a block. Layers are modules
              with a weight of two or more dimensions; normalizations, activations and other modules join the layer
              before them. The last layer, which computes the network's output, belongs to no block.
            - ``[n1, n2, ...]``: blocks of these numbers of layers. They may also cover the last layer.
            - ``["features.*", "head"]``: shell-style patterns on module names. Every outermost module that matches is
              a block of its own, if it is a layer; a list of patterns (``[["embed", "layer.0"], "layer.1"]``) makes one
              block. In such a list a pattern may also name a parameter outside of layers (``"position"``).
            - a function from the network to a list of lists of its modules.

    Raises:
        ValueError: if the network is not a chain of layers and ``blocks`` is a number, if a pattern matches nothing, if
            blocks overlap, or if a block has no parameters; the message lists the network's modules.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> [block.name for block in cut(net).blocks], list(cut(net).rest)
        (['0..1', '2..3'], ['4.weight', '4.bias'])
        >>> [block.name for block in cut(net, [["0", "1", "2", "3"]]).blocks]
        ['0..3']
    """
    names = {id(module): name for name, module in reversed(list(network.named_modules()))}
    if callable(blocks):
        found = [_block(list(modules), [], names) for modules in blocks(network)]
    elif isinstance(blocks, int):
        found = _automatic(network, blocks, names)
    elif all(isinstance(size, int) for size in blocks):
        found = _by_sizes(network, [int(size) for size in blocks], names)  # type: ignore[arg-type]
    else:
        found = _by_patterns(network, blocks, names)  # type: ignore[arg-type]
    _check(network, found)
    covered = {id(parameter) for block in found for parameter in block.parameters}
    return Cut(found, {name: p for name, p in network.named_parameters() if id(p) not in covered})


def _block(modules: list[nn.Module], named: Iterable[nn.Parameter], names: dict[int, str]) -> Block:
    parameters = [parameter for module in modules for parameter in module.parameters()] + list(named)
    labels = [names.get(id(module), type(module).__name__) for module in modules]
    name = labels[0] if len(labels) == 1 else f"{labels[0]}..{labels[-1]}" if labels else "nothing"
    return Block(name, modules, list({id(parameter): parameter for parameter in parameters}.values()))


# --- automatic: chains of layers ----------------------------------------------------------------------------------


def _chain(network: nn.Module) -> list[nn.Module] | None:
    """Return the modules that run in sequence, or None if the structure does not show it."""
    if isinstance(network, nn.Sequential):
        return [
            part
            for child in network
            for part in ((_chain(child) or [child]) if isinstance(child, nn.Sequential) else [child])
        ]
    children = [child for child in network.children() if any(True for _ in child.parameters())]
    if len(children) == 1 and not network._parameters:
        return _chain(children[0])
    return None


def is_layer(module: nn.Module) -> bool:
    """Whether a module has a weight of two or more dimensions; normalizations have none."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _layers(network: nn.Module) -> list[list[nn.Module]]:
    chain = _chain(network)
    if chain is None and not suggestion(network):
        raise RefusedError(
            f"{type(network).__name__} has no two layers, one of which could make a block before the output. Name a "
            f"module with more layers by network=..., or use a rule that needs no blocks. {_listing(network)}"
        )
    if chain is None:
        raise RefusedError(
            f"{type(network).__name__} does not show the order of its layers (it is not an nn.Sequential): name its "
            f"blocks by patterns, such as {_example(network)} {_listing(network)}"
        )
    return _joined(chain)


def _joined(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Return the modules in lists of one layer each; the others join the layer before them, or the first layer."""
    layers: list[list[nn.Module]] = []
    head: list[nn.Module] = []
    for part in modules:
        if is_layer(part):
            layers.append([*head, part])
            head = []
        else:
            (layers[-1] if layers else head).append(part)
    return layers or [head]


def _automatic(network: nn.Module, size: int, names: dict[int, str]) -> list[Block]:
    layers = _layers(network)
    if len(layers) < 2:
        raise RefusedError(
            f"blocks={size}: {type(network).__name__} has {len(layers)} layer(s) with weights; a cut needs one block "
            "and the last layer."
        )
    chunks = [layers[start : min(start + size, len(layers) - 1)] for start in range(0, len(layers) - 1, size)]
    return [_block([part for layer in chunk for part in layer], [], names) for chunk in chunks]


def _by_sizes(network: nn.Module, sizes: list[int], names: dict[int, str]) -> list[Block]:
    layers = _layers(network)
    if sum(sizes) not in (len(layers) - 1, len(layers)):
        raise RefusedError(
            f"blocks={sizes} asks for {sum(sizes)} layers, and {type(network).__name__} has {len(layers)}: give sizes "
            f"of at least 1 that sum to {len(layers) - 1} (without the last layer) or {len(layers)}."
        )
    found = []
    for size in sizes:
        chunk, layers = layers[:size], layers[size:]
        found.append(_block([part for layer in chunk for part in layer], [], names))
    return found


# --- by names -----------------------------------------------------------------------------------------------------


def _by_patterns(network: nn.Module, blocks: Sequence[str | Sequence[str]], names: dict[int, str]) -> list[Block]:
    found = []
    for entry in blocks:
        if isinstance(entry, str):
            found += [_block(modules, [], names) for modules in _joined(_matching(network, entry, names))]
            continue
        together: list[nn.Module] = []
        named: list[nn.Parameter] = []
        for pattern in entry:
            own = [p for name, p in network.named_parameters() if fnmatchcase(name, pattern)]
            matches_a_module = any(fnmatchcase(name, pattern) for name in names.values())
            named += [] if matches_a_module else own
            together += _matching(network, pattern, names) if matches_a_module or not own else []
        found.append(_block(together, named, names))
    return found


def _matching(network: nn.Module, pattern: str, names: dict[int, str]) -> list[nn.Module]:
    """Return the outermost modules whose name matches, in their order."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for name, module in network.named_modules():
        if name and id(module) not in inside and fnmatchcase(name, pattern):
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    if not found:
        near = difflib.get_close_matches(pattern, list(names.values()), n=3, cutoff=0.0)
        raise RefusedError(
            f"blocks: {pattern!r} matches no module; nearest: {', '.join(filter(None, near)) or 'none'}. "
            f"Patterns are shell-style: 'layers.*'. {_listing(network)}"
        )
    return found


def _check(network: nn.Module, blocks: list[Block]) -> None:
    home: dict[int, Block] = {}
    for block in blocks:
        if not block.modules or not block.parameters:
            raise RefusedError(f"blocks: {block.name} has no parameters to train. {_listing(network)}")
        for module in {id(part): part for top in block.modules for part in top.modules()}.values():
            other = home.setdefault(id(module), block)
            if other is not block:
                raise RefusedError(
                    f"blocks: {other.name} and {block.name} overlap (both have a {type(module).__name__}). Every "
                    f"module belongs to one block. {_listing(network)}"
                )


def suggestion(network: nn.Module) -> list[str | list[str]]:
    """Return names of blocks that are likely to work: layers in registration order, without the output layer.

    Token embeddings join the layer after them, since nothing can be added to tokens; normalizations and activations
    join the layer before them.

    Args:
        network: a network that does not show the order of its layers.

    Examples:
        >>> net = nn.ModuleDict({"embed": nn.Embedding(5, 4), "one": nn.Linear(4, 4), "two": nn.Linear(4, 2)})
        >>> suggestion(net)
        [['embed', 'one']]
    """
    groups: list[list[str]] = []
    for name in _units(network, ""):
        part = network.get_submodule(name)
        joins = bool(groups) and (not is_layer(part) or _reads_tokens(network, groups[-1]))
        groups[-1].append(name) if joins else groups.append([name])
    while groups and not any(is_layer(network.get_submodule(name)) for name in groups[0]):
        groups = groups[1:]
    last = groups[-1] if len(groups) > 1 else []
    kept = groups[:-1] if last else groups
    return [group[0] if len(group) == 1 else group for group in kept]


def _reads_tokens(network: nn.Module, names: Sequence[str]) -> bool:
    parts = [part for name in names for part in network.get_submodule(name).modules()]
    layers = [part for part in parts if any(p is not None and p.dim() > 1 for p in part._parameters.values())]
    return bool(layers) and all(isinstance(part, nn.Embedding) for part in layers)


def _units(module: nn.Module, prefix: str) -> list[str]:
    """Return the names of what runs in one piece, in the order in which it is registered."""
    found: list[str] = []
    for name, child in module.named_children():
        inner = any(isinstance(part, nn.ModuleList | nn.Sequential) for part in child.modules())
        if inner and child._parameters == {}:
            found += _units(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()) or not list(child.children()):
            found.append(f"{prefix}{name}")
    return found


def _example(network: nn.Module) -> str:
    functions = functional_lines(network)
    said = "" if not functions else f" Activations that are functions stay outside of blocks: {as_modules(network)}"
    order = "in the order in which they run (the layer that makes the output stays out)"
    return f"blocks={suggestion(network)}, {order}.{said}"


def _listing(network: nn.Module) -> str:
    names = [name for name, module in network.named_modules() if name and any(True for _ in module.parameters())]
    shown = ", ".join(names[:40])
    return f"Modules with parameters: {shown or 'none'}{', ...' if len(names) > 40 else ''}."


def find_network(module: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """Return name and module of the network in ``module``, which maps inputs to outputs in one call per step.

    Args:
        module: a LightningModule, or any module.
        name: the network's name, ``""`` for ``module`` itself. None takes the only child with parameters.

    Raises:
        ValueError: if there is no such module, or more than one candidate.

    Examples:
        >>> find_network(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))[0]
        '0'
    """
    children = [n for n, child in module.named_children() if any(True for _ in child.parameters())]
    if name is None:
        if len(children) != 1 or module._parameters:
            child = f", network={children[0]!r}" if children else ""
            raise RefusedError(
                f"network: {type(module).__name__} has {len(children)} children with parameters "
                f"({', '.join(children) or 'none'}). Name the one that maps inputs to outputs{child}, or the module "
                "itself, network=''."
            )
        name = children[0]
    try:
        return name, module.get_submodule(name)
    except AttributeError:
        raise RefusedError(
            f"network={name!r} is not a part of {type(module).__name__}; its children with parameters: "
            f"{', '.join(children) or 'none'}."
        ) from None
