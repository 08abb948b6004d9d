"""Named parameters of a module: selection by pattern, arithmetic, and temporary replacement."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.core.replay.object_graph import Place

Params = dict[str, Tensor]


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product over all tensors of ``a``, a scalar accumulated in at least float32.

    Examples:
        >>> dot({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])})
        tensor(11.)
    """
    total: Tensor | None = None
    for name, left in a.items():
        part = torch.dot(_flat(left), _flat(b[name]))
        total = part if total is None else total + part.to(total.device)
    return torch.zeros(()) if total is None else total


def norm(a: Mapping[str, Tensor]) -> Tensor:
    """Return the Euclidean norm over all tensors of ``a``, dense or sparse: a scalar of at least float32."""
    norms = [torch.linalg.vector_norm(widen(_values(tensor))) for tensor in a.values()]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])) if norms else torch.zeros(())


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients; None counts as zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def count(a: Mapping[str, Tensor]) -> int:
    """Return the number of real coordinates over all tensors of ``a``; a complex number has two.

    Examples:
        >>> count({"w": torch.zeros(3), "z": torch.zeros(2, dtype=torch.complex64)})
        7
    """
    return sum(tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in a.values())


def real_view(tensor: Tensor) -> Tensor:
    """Return complex tensors as real ones of shape ``(*shape, 2)`` in the same memory, others unchanged.

    With real and imaginary parts as coordinates, PyTorch's gradient of a real loss is the ordinary one.
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _flat(tensor: Tensor) -> Tensor:
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return widen(real_view(dense.resolve_conj())).flatten()


def _values(tensor: Tensor) -> Tensor:
    return tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor


def widen(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others unchanged: sums of many terms need the precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Slot(NamedTuple):
    """One parameter and every place in the module that refers to it (several for tied weights)."""

    name: str
    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]


class ParameterSlots:
    """The parameters of ``module`` whose names match ``patterns``, each tensor once, with all places that hold it.

    Args:
        module: the module.
        patterns: shell-style patterns on parameter names (``"net.0.*"``, ``"*.lora_*"``); ``None`` selects all.

    Raises:
        ValueError: if a pattern matches no parameter; the message lists the nearest names.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> [slot.name for slot in ParameterSlots(net, ["0.*"])]
        ['0.weight', '0.bias']
    """

    def __init__(self, module: nn.Module, patterns: str | Sequence[str] | None = None) -> None:
        places: dict[int, Slot] = {}
        aliases: dict[int, list[str]] = {}
        for prefix, owner in module.named_modules():
            for key, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                slot = places.setdefault(id(parameter), Slot(name, parameter, []))
                slot.places.append((owner, key))
                aliases.setdefault(id(parameter), []).append(name)
        chosen = _match(patterns, [name for names in aliases.values() for name in names])
        self.slots = [slot for key, slot in places.items() if not chosen.isdisjoint(aliases[key])]
        self.rest = [slot for key, slot in places.items() if chosen.isdisjoint(aliases[key])]
        self._elsewhere: dict[str, list[Place]] = {}
        self._moved: Callable[[], set[int]] | None = None

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def trainable(self) -> list[Slot]:
        """Return the selected slots whose parameter requires a gradient now (freezing may change during a fit).

        Parameters that no optimizer updates are excluded: directions along them would be noise in the estimate.
        """
        moved = None if self._moved is None else self._moved()
        if moved is not None and all(id(slot.parameter) not in moved for slot in [*self.slots, *self.rest]):
            moved = None  # the optimizer has copies, or flattened ones
        return [s for s in self.slots if s.parameter.requires_grad and (moved is None or id(s.parameter) in moved)]

    def restrict_to(self, moved: Callable[[], set[int]]) -> None:
        """Treat only parameters that an optimizer updates as trainable.

        Args:
            moved: returns the current ids of these parameters.
        """
        self._moved = moved

    def add_places(self, modules: Iterable[nn.Module], places: Iterable[Place]) -> None:
        """Add further places that hold the parameters: unregistered modules, lists, dicts.

        Args:
            modules: all modules, registered or not.
            places: places of parameters in containers and attributes.
        """
        slots = {id(slot.parameter): slot for slot in self.slots}
        for owner in modules:
            for key, parameter in owner._parameters.items():
                slot = slots.get(id(parameter))
                if slot is not None and not any(o is owner and k == key for o, k in slot.places):
                    slot.places.append((owner, key))
        for place in places:
            slot = slots.get(id(place.get()))
            if slot is not None:
                self._elsewhere.setdefault(slot.name, []).append(place)

    @contextlib.contextmanager
    def replaced(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the module compute with ``params`` in this context; its own parameters are restored unchanged."""
        slots = [slot for slot in self.slots if slot.name in params]
        elsewhere = {slot.name: [p for p in self._elsewhere.get(slot.name, ()) if _holds(p, slot)] for slot in slots}

        def fill(slot: Slot, tensor: Tensor) -> None:
            for owner, key in slot.places:
                place(owner, key, tensor if tensor is slot.parameter else _looked_up(slot, owner, tensor))
            for further in elsewhere[slot.name]:
                further.put(tensor)

        try:
            for slot in slots:
                fill(slot, params[slot.name])
            yield
        finally:
            for slot in slots:
                fill(slot, slot.parameter)


def _looked_up(slot: Slot, owner: nn.Module, tensor: Tensor) -> Tensor:
    """Return what ``owner`` computes with: an embedding that is tied to a layer looks up its padding row unmoved.

    Backprop moves that row through the layer, and not through the embedding.
    """
    row = owner.padding_idx if isinstance(owner, nn.Embedding) else None
    if row is None or all(getattr(other, "padding_idx", None) == row for other, _ in slot.places):
        return tensor
    index = torch.tensor([row], device=tensor.device)
    return tensor.index_copy(0, index, slot.parameter.detach()[row : row + 1].to(tensor.dtype))


def _holds(found: Place, slot: Slot) -> bool:
    """Whether the parameter is still where it was found: a list may have been emptied since."""
    try:
        return found.get() is slot.parameter
    except (LookupError, TypeError):
        return False


def place(owner: nn.Module, key: str, tensor: Tensor | None) -> None:
    """Let ``owner`` compute with ``tensor`` as its parameter ``key``.

    This writes to the registry directly, as ``torch.func.functional_call`` does: ``nn.Module`` does not allow
    assigning a plain tensor to a parameter's name.
    """
    owner._parameters[key] = tensor  # type: ignore[assignment]  # a plain tensor stands in for the Parameter
    if isinstance(owner, nn.RNNBase) and key in owner._flat_weights_names:
        # Recurrent layers keep a second list of their weights, and compute with that one. It is replaced, not
        # written into: whoever has remembered the list expects to find the parameters in it.
        weights = list(owner._flat_weights)
        weights[owner._flat_weights_names.index(key)] = tensor
        owner._flat_weights = weights


def _match(patterns: str | Sequence[str] | None, names: Sequence[str]) -> set[str]:
    if patterns is None:
        return set(names)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.0)
            raise ValueError(
                f"params={pattern!r} matches none of the module's {len(names)} parameters. Nearest names: "
                f"{', '.join(near) or 'none, the module has no parameters'}. Patterns are shell-style: 'net.0.*'."
            )
        chosen |= found
    return chosen
