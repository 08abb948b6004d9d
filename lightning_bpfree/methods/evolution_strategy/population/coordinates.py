"""Named parameters as one flat vector, and back; with masks, the vector holds only the survivors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_bpfree.core.params import Params, real_view


class Coordinates:
    """The coordinates that a search moves, in the order of ``like``, as one vector; a complex number has two.

    Args:
        like: named tensors whose shapes, dtypes and devices count.
        masks: name -> boolean tensor of the parameter's shape, True where the coordinate is searched; a parameter
            without a mask is searched whole. The others are pruned: they count as zero.

    Raises:
        ValueError: for a mask of another shape than its parameter.

    Examples:
        >>> coordinates = Coordinates({"w": torch.zeros(2, 2), "b": torch.zeros(2)}, {"w": torch.eye(2) > 0})
        >>> coordinates.dim
        4
        >>> coordinates.unflatten(torch.tensor([1.0, 2.0, 3.0, 4.0]))["w"]
        tensor([[1., 0.],
                [0., 2.]])
    """

    def __init__(self, like: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> None:
        self.like = {name: tensor.detach() for name, tensor in like.items()}
        self.sizes = [real_view(tensor).numel() for tensor in self.like.values()]
        self._full = sum(self.sizes)
        self._survivors = None if masks is None else self._indices(masks)
        self.layout = self._layout(masks)
        self.dim = self._full if self._survivors is None else len(self._survivors)
        self.device = next((tensor.device for tensor in self.like.values()), torch.device("cpu"))
        doubles = any(real_view(tensor).dtype == torch.float64 for tensor in self.like.values())
        self.dtype = torch.float64 if doubles else torch.float32

    def _indices(self, masks: Mapping[str, Tensor]) -> Tensor:
        for name, mask in masks.items():
            if name in self.like and mask.shape != self.like[name].shape:
                shapes = f"shape {tuple(mask.shape)}, the parameter {tuple(self.like[name].shape)}"
                raise ValueError(f"the mask of {name} has the {shapes}: give a mask of the parameter's shape.")
        kept = [masks.get(name, torch.ones((), dtype=torch.bool)) for name in self.like]
        flat = [
            mask.cpu().expand(tensor.shape).flatten().repeat_interleave(2 if tensor.is_complex() else 1)
            for mask, tensor in zip(kept, self.like.values(), strict=True)
        ]
        return torch.cat(flat).nonzero().flatten().to(next(iter(self.like.values())).device)

    def _layout(self, masks: Mapping[str, Tensor] | None) -> dict[str, int]:
        """Return how many coordinates each parameter has in the vector."""
        parts = {name: 2 if tensor.is_complex() else 1 for name, tensor in self.like.items()}
        own = {} if masks is None else {n: parts[n] * int(mask.sum()) for n, mask in masks.items() if n in parts}
        return {name: own.get(name, size) for name, size in zip(self.like, self.sizes, strict=True)}

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the coordinates of ``params`` as a new vector, shape ``(dim,)``, in at least float32."""
        parts = [real_view(params[name].detach()).to(self.device, self.dtype) for name in self.like]
        flat = torch.cat([part.flatten() for part in parts])
        return flat if self._survivors is None else flat.index_select(0, self._survivors)

    def views(self, flat: Tensor) -> Params | None:
        """Return named views of ``flat``, which change with it; None where there are none (masks, other types)."""
        named = self.unflatten(flat)
        shared = flat.untyped_storage().data_ptr()
        same = all(tensor.untyped_storage().data_ptr() == shared for tensor in named.values())
        return named if same else None

    def unflatten(self, flat: Tensor) -> Params:
        """Return named tensors, where they can be views, in the dtypes and on the devices of ``like``.

        Args:
            flat: shape ``(dim,)``, or ``(C, dim)`` for tensors of the shapes ``(C, *shape)``.
        """
        if self._survivors is not None:
            whole = flat.new_zeros(*flat.shape[:-1], self._full)
            flat = whole.index_copy_(-1, self._survivors, flat)
        parts = flat.split(self.sizes, dim=-1)
        return {
            name: _shaped(part, like).to(like.device, like.dtype)
            for (name, like), part in zip(self.like.items(), parts, strict=True)
        }


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    """Return coordinates ``(*lead, numbers)`` in the shape ``(*lead, *like.shape)``."""
    lead = part.shape[:-1]
    if not like.is_complex():
        return part.view((*lead, *like.shape))
    pairs = part.reshape((*lead, *like.shape, 2))
    # Numbers that begin at an odd place of the vector cannot be seen as complex ones in place.
    aligned = part.storage_offset() % 2 == 0 and all(stride % 2 == 0 for stride in part.stride()[:-1])
    return torch.view_as_complex(pairs if aligned else pairs.clone())
