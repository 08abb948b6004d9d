"""The layers of an existing model as a reversible stack, in the place of the list that held them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_bpfree.core.inventory import Inventory
from lightning_bpfree.core.recompute import Autocast, Draws
from lightning_bpfree.nn.coupling import Coupling
from lightning_bpfree.nn.fusion import Fusion, StreamFusion
from lightning_bpfree.nn.layer_family import CACHES, Family, Rewire
from lightning_bpfree.nn.recomputation import Recomputation, Schedule

# Recovering divides by the scales, so rounding errors grow by 1 / (s1 s2) a block. So much is let through in float32.
_ERROR = 1e-3


class ReversibleLayers(nn.Module):
    """Layers of one family as reversible blocks, with the names of parameters that they had in their list.

    It takes the place of an ``nn.ModuleList`` or ``nn.Sequential``. Indexing gives the layers, untouched. A loop over
    it sees each stretch of reversible layers as one layer: the stretch doubles its input into two streams, runs all of
    its blocks, and fuses the streams. Layers that change the shape stay ordinary layers between two stretches.

    Args:
        layers: the layers.
        family: what takes them apart.
        schedule: see :class:`~lightning_bpfree.nn.recomputation.Recomputation`.
        rewire: for post-norm layers: ``"pre_norm"`` puts their normalisations before the branches; ``"scaled"`` keeps
            whole sublayers as branches and scales the skips. None for pre-norm layers.
        scale: factors of both skips, above 0.
        fusion: a mode of :class:`StreamFusion` that keeps the width.
        buffer_every: keep the inputs of every so many blocks; None for none; ``"auto"``: as many as rounding errors,
            which scales below 1 enlarge, call for.
        max_error: largest relative error of recovered inputs; None for any.
        check_every: measure it in one of so many passes.
        store_last: so many blocks at the top of each stretch keep their activations.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        family: Family,
        schedule: Schedule = "sequential",
        *,
        rewire: Rewire | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        fusion: Fusion = "mean",
        buffer_every: int | Literal["auto"] | None = None,
        max_error: float | None = None,
        check_every: int = 1,
        store_last: int = 0,
    ) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        self.depth, self.family, self.rewire, self.scale = len(layers), family, rewire, scale
        every = buffers_for(scale) if buffer_every == "auto" else buffer_every
        self.stretches = _stretches([family.reversible(layer) for layer in layers])
        self.recomputations = [
            Recomputation(schedule, every, max_error, check_every, store_last) for _ in self.stretches
        ]
        # Only a fusion with weights is a module of its own, so that the names of a model's state stay what they are.
        self.fusion, self.fusions = fusion, None if fusion != "concat_linear" else self._fusions_with_weights()
        self._plain_fusion = StreamFusion(fusion).forward if self.fusions is None else None
        self.compared = not family.checked

    def _fusions_with_weights(self) -> nn.ModuleList:
        first = [self[stretch.start] for stretch in self.stretches]
        made = nn.ModuleList(StreamFusion("concat_linear", self.family.channels(layer)) for layer in first)
        like: Tensor = next(first[0].parameters())
        return made.to(like.device, like.dtype)

    # --- as a list ---

    def __len__(self) -> int:
        return self.depth

    def __getitem__(self, index: int | slice) -> Any:
        numbers = range(self.depth)[index]
        return self._modules[str(numbers)] if isinstance(numbers, int) else [self._modules[str(i)] for i in numbers]

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """Yield what a model's loop calls one after the other: stretches, and ordinary layers between them."""
        index = 0
        for number, stretch in enumerate(self.stretches):
            yield from self[index : stretch.start]
            yield functools.partial(self._run, number)
            index = stretch.stop
        yield from self[index:]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run all layers, as ``nn.Sequential`` does."""
        for part in self:
            x = part(x, *args, **kwargs)
            x = x[0] if self.family.returns_tuple else x
        return (x, None) if self.family.returns_tuple else x

    # --- as a stack ---

    @property
    def schedule(self) -> Schedule:
        """How activations come back; may be set at any time."""
        return self.recomputations[0].schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        for recomputation in self.recomputations:
            recomputation.schedule = schedule

    @property
    def reconstruction_error(self) -> float | None:
        """The largest relative error of recovered inputs that was last measured; None if none was."""
        errors = [r.error for r in self.recomputations if r.error is not None]
        return max(errors, default=None)

    def couplings(self, stretch: range) -> list[Coupling]:
        """Return reversible layers as schedules see them."""
        made = []
        for index in stretch:
            f, g = self.family.branches(self[index], self.rewire)
            layer = self[index]
            label = f"layer {index}"
            made.append(Coupling(functools.partial(f, layer), functools.partial(g, layer), layer, self.scale, label))
        return made

    def _run(self, number: int, *args: Any, **kwargs: Any) -> Any:
        stretch = self.stretches[number]
        first = self[stretch.start]
        x, context = self.family.bind(first, args, kwargs)
        if not self.compared:
            self._compare(first, x, context, args, kwargs)
        y1, y2 = self.recomputations[number].run(self.couplings(stretch), x, x, context)
        fuse: Any = self._plain_fusion if self.fusions is None else self.fusions[number]
        y = fuse(y1, y2)
        return (y, None) if self.family.returns_tuple else y

    def _compare(
        self, layer: nn.Module, x: Tensor, context: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse layers whose branches do not add up to the layer itself; once."""
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or torch.compiler.is_compiling() or not CACHES.isdisjoint(context):
            return  # a later call will do
        draws = Draws.now(x)
        outs = []
        for run in (
            functools.partial(type(layer).forward, layer, *args, **kwargs),
            functools.partial(self.family.original, layer, x, context),
        ):
            with torch.no_grad(), draws.kept(), _buffers_kept(layer):
                out = run()
            outs.append((out[0] if isinstance(out, tuple) else out).double())
        # A fused kernel of the layer may give no number where all keys are masked.
        outs = [torch.where(outs[0].isfinite(), out, 0.0) for out in outs]
        # Both compute the same operators in nearly the same order; half precision rounds to three digits.
        low = x.dtype in (torch.float16, torch.bfloat16) or Autocast.now(x.device.type).enabled
        off = torch.linalg.vector_norm(outs[0] - outs[1])
        if not float(off) <= (5e-2 if low else 1e-4) * float(torch.linalg.vector_norm(outs[0])) + 1e-12:
            raise RuntimeError(
                f"{type(layer).__name__} looks like a {self.family.name}, but computes something else than its "
                "attention and feed-forward branches added up. Give its branches: "
                "convert_to_reversible(..., branches=(f, g))."
            )
        self.compared = True

    def extra_repr(self) -> str:
        """Return what was made of the layers."""
        return f"schedule={self.schedule}, family={self.family.name}, rewire={self.rewire}, scale={self.scale}"


def _buffers_kept(layer: nn.Module) -> AbstractContextManager[Any]:
    inventory = Inventory(layer, "the layer")
    return inventory.again(inventory.copies(), aliases=False)


def buffers_for(scale: tuple[float, float]) -> int | None:
    """Return after how many blocks of these scales inputs should be kept; None if errors do not grow.

    Examples:
        >>> buffers_for((1.0, 1.0)), buffers_for((0.5, 0.5)), buffers_for((0.1, 0.1))
        (None, 7, 2)
    """
    growth = 1 / (scale[0] * scale[1])
    if growth <= 1:
        return None
    return max(1, round(math.log(_ERROR / torch.finfo(torch.float32).eps) / math.log(growth)))


def _stretches(reversible: Sequence[bool]) -> list[range]:
    """Return the longest ranges of reversible layers.

    >>> _stretches([False, True, True, False, True])
    [range(1, 3), range(4, 5)]
    """
    found: list[range] = []
    for index, fits in enumerate(reversible):
        if fits and found and found[-1].stop == index:
            found[-1] = range(found[-1].start, index + 1)
        elif fits:
            found.append(range(index, index + 1))
    return found
