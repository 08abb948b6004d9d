"""Boolean masks over named parameters: which weights survive, and tensors of only the survivors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonEmpty, checked
from lightning_bpfree.core.params import Params
from lightning_bpfree.core.seeds import mix


@runtime_checkable
class Restricts(Protocol):
    """A training rule that searches surviving weights only, and keeps a deviation for each of them.

    ``LotteryTicket`` calls these methods on a rule that has all three.
    """

    def restrict(self, masks: Masks | None) -> None:
        """Search the survivors of ``masks`` only, from the next batch on (None: all weights).

        Called at the start of every fit, after a resume too, and whenever masks change; then :meth:`restart` follows.

        Raises:
            ValueError: if the rule cannot search under masks with its settings.
        """

    def restart(self) -> None:
        """Forget the search so far: fresh deviations, fresh noise, the present parameters as the new mean."""

    def std(self) -> Params | None:
        """Return the standard deviation of every weight, in full shape by name; None where one serves all weights."""


class Masks(Mapping[str, Tensor]):
    """Which entries of named tensors survive; never inferred from ``w != 0``, since a weight may be zero by chance.

    Args:
        masks: boolean tensors by parameter name, shaped like the parameters; True survives.

    Raises:
        ValueError: without any mask, or for one that is not boolean.

    Examples:
        >>> masks = Masks({"w": torch.tensor([[True, False], [True, True]])})
        >>> masks.kept, masks.total, masks.sparsity
        (3, 4, 0.25)
        >>> w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> masks.apply_({"w": w})
        >>> w
        tensor([[1., 0.],
                [3., 4.]])
    """

    @checked
    def __init__(self, masks: Annotated[Mapping[str, Tensor], NonEmpty()]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(
                    f"The mask of {name!r} is {mask.dtype}: give a tensor of torch.bool, True where it survives."
                )
        self._masks = {name: mask.detach() for name, mask in masks.items()}
        self._indices: Params = {}
        self._pruned: Params = {}
        self._counts: dict[str, int] | None = None

    @classmethod
    def dense(cls, like: Mapping[str, Tensor]) -> Masks:
        """Return masks in which every entry of ``like`` survives."""
        return cls({name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in like.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(mask, other[name]) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]  # tensors can be compared, not hashed

    def __repr__(self) -> str:
        return f"Masks({self.kept:,} of {self.total:,} weights left in {len(self)} tensors)"

    # --- counts ---

    @property
    def counts(self) -> dict[str, int]:
        """The number of survivors by name."""
        if self._counts is None:
            sums = torch.stack([mask.sum().cpu() for mask in self._masks.values()]).tolist()  # one wait for the device
            self._counts = dict(zip(self._masks, sums, strict=True))
        return dict(self._counts)

    @property
    def kept(self) -> int:
        """The number of survivors."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """The number of entries, pruned ones included."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def weights_left(self) -> float:
        """The share of survivors, in [0, 1]."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """The share of pruned entries, in [0, 1]."""
        return 1 - self.weights_left

    # --- use ---

    def index(self, name: str) -> Tensor:
        """Return the flat index of the survivors of ``name``, ascending, ``(num_survivors,)`` of int64."""
        if name not in self._indices:
            self._indices[name] = self._masks[name].flatten().nonzero().squeeze(1)
        return self._indices[name]

    def apply_(self, params: Mapping[str, Tensor], *, missing_ok: bool = False) -> None:
        """Set the pruned entries of ``params`` to zero, in place; tensors without a mask do not change.

        Args:
            params: named tensors with the shapes of the masks.
            missing_ok: allow missing names in ``params``.

        Raises:
            ValueError: for missing names or different shapes.
        """
        missing = [name for name in self._masks if name not in params]
        if missing and not missing_ok:
            raise ValueError(f"There are masks, and no tensors, for {', '.join(missing)}.")
        with torch.no_grad():
            for name in [name for name in self._masks if name in params]:
                self._check(name, params[name].shape)
                if name not in self._pruned:
                    self._pruned[name] = ~self._masks[name]
                params[name].masked_fill_(self._pruned[name], 0)  # a product would keep NaN, infinity and -0

    def permuted(self, seed: int) -> Masks:
        """Return masks with the entries of each tensor in random order; counts and global streams do not change."""
        permuted = {}
        for i, (name, mask) in enumerate(self._masks.items()):
            generator = torch.Generator().manual_seed(mix(seed, i))  # on the CPU: the same on every kind of device
            order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
            permuted[name] = mask.flatten()[order].view(mask.shape)
        return Masks(permuted)

    def to(self, device: torch.device | str) -> Masks:
        """Return the masks on ``device``; the same object if they are there already."""
        moved = {name: mask.to(device) for name, mask in self._masks.items()}
        return self if all(moved[name] is mask for name, mask in self._masks.items()) else Masks(moved)

    def _check(self, name: str, shape: torch.Size) -> None:
        if shape != self._masks[name].shape:
            mask = tuple(self._masks[name].shape)
            raise ValueError(f"{name!r} has shape {tuple(shape)}, and its mask {mask}: they must agree.")
