"""The layers of an existing model as a reversible stack, which replaces their list."""

from __future__ import annotations

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveFloat, PositiveInt, checked
from lightning_bpfree.core.recompute_context import Autocast, Draws
from lightning_bpfree.methods.reversible_recompute.coupling import Coupling
from lightning_bpfree.methods.reversible_recompute.families.base import CACHES, Family, Rewire
from lightning_bpfree.methods.reversible_recompute.module_snapshot import Inventory
from lightning_bpfree.methods.reversible_recompute.recomputation import Recomputation, Schedule
from lightning_bpfree.methods.reversible_recompute.refused import RefusedStackError
from lightning_bpfree.methods.reversible_recompute.stream_fusion import Fusion, StreamFusion

# Recovering divides by the scales, so rounding errors grow by 1 / (s1 s2) a block. So much is let through in float32.
_ERROR = 1e-3
_HALF = (torch.float16, torch.bfloat16)


class ReversibleLayers(nn.Module):
    """Layers of one family as reversible blocks, with unchanged parameter names.

    It takes the place of an ``nn.ModuleList`` or ``nn.Sequential``. A number gives a layer, untouched. A loop over it,
    or over a slice of it, sees each stretch of reversible layers as one layer: the stretch doubles its input into two
    streams, runs all of its blocks, and fuses the streams. Layers that change the shape stay ordinary layers between
    two stretches.

    Args:
        layers: the layers.
        family: what takes them apart.
        schedule: see :class:`~lightning_bpfree.methods.reversible_recompute.recomputation.Recomputation`.
        rewire: for post-norm layers: ``"pre_norm"`` puts their normalizations before the branches; ``"scaled"`` keeps
            whole sublayers as branches and scales the skips. None for pre-norm layers.
        scale: factors of both skips, above 0.
        fusion: a mode of :class:`StreamFusion` that keeps the width.
        buffer_every: keep the inputs of every n-th block; None for none; ``"auto"``: chosen by the rounding errors,
            which scales below 1 amplify.
        max_error: largest relative error of recovered inputs; None for any.
        check_every: measure it in every n-th pass.
        store_last: number of blocks at the top of each stretch that keep their activations.
    """

    @checked
    def __init__(
        self,
        layers: Sequence[nn.Module],
        family: Family,
        schedule: Schedule = "sequential",
        *,
        rewire: Rewire | None = None,
        scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0),
        fusion: Fusion = "mean",
        buffer_every: PositiveInt | Literal["auto"] | None = None,
        max_error: PositiveFloat | None = None,
        check_every: PositiveInt = 1,
        store_last: NonNegativeInt = 0,
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
        self.compared: set[type] = set()

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
        if isinstance(numbers, int):
            return self._modules[str(numbers)]
        if numbers.step != 1:
            raise IndexError(
                f"a slice with step {numbers.step} of reversible layers, which run one after the other: leave the step "
                "out, or take layers by their numbers."
            )
        return self._parts(numbers)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """Yield what a model's loop calls one after the other: stretches, and ordinary layers between them."""
        return iter(self._parts(range(self.depth)))

    def _parts(self, numbers: range) -> list[Callable[..., Any]]:
        parts: list[Callable[..., Any]] = []
        index = numbers.start
        for number, stretch in enumerate(self.stretches):
            cut = range(max(stretch.start, numbers.start), min(stretch.stop, numbers.stop))
            if cut:
                parts += [*(self[i] for i in range(index, cut.start)), Stretch(self, number, cut)]
                index = cut.stop
        return [*parts, *(self[i] for i in range(index, numbers.stop))]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run all layers, as ``nn.Sequential`` does."""
        for part in self:
            x = part(x, *args, **kwargs)
            x = x[0] if self.family.returns_tuple else x
        return (x, None) if self.family.returns_tuple else x

    # --- as a stack ---

    @property
    def schedule(self) -> Schedule:
        """How activations are recovered; may be set at any time."""
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

    def couplings(self, layers: range) -> list[Coupling]:
        """Return reversible layers as schedules see them."""
        made = []
        for index in layers:
            f, g = self.family.branches(self[index], self.rewire)
            layer = self[index]
            label = f"layer {index}"
            made.append(Coupling(functools.partial(f, layer), functools.partial(g, layer), layer, self.scale, label))
        return made

    def run(self, number: int, layers: range, *args: Any, **kwargs: Any) -> Any:
        """Run layers of the stretch with that number, as one layer of the family runs."""
        first = self[layers.start]
        x, context = self.family.bind(first, args, kwargs)
        for index in layers:
            if self.family.checked and type(self[index]) not in self.compared:
                self._compare(self[index], x, context, args, kwargs)
        y1, y2 = self.recomputations[number].run(self.couplings(layers), x, x, context)
        fuse: Any = self._plain_fusion if self.fusions is None else self.fusions[number]
        y = fuse(y1, y2)
        return (y, None) if self.family.returns_tuple else y

    def _compare(
        self, layer: nn.Module, x: Tensor, context: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse layers whose branches do not add up to the layer itself; once for each class of layers."""
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or torch.compiler.is_compiling() or not CACHES.isdisjoint(context):
            return  # a later call will do
        draws, low = Draws.now(x), x.dtype in _HALF or Autocast.now(x.device.type).enabled
        alike, cause = False, None
        with torch.no_grad(), draws.kept(), _buffers_kept(layer), _unheard(layer):
            own = type(layer).forward(layer, *args, **kwargs)
        try:
            with torch.no_grad(), draws.kept(), _buffers_kept(layer), _unheard(layer):
                alike = _alike(own, self.family.original(layer, x, context), low)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            cause = error  # parts of another kind than those of the family
        if not alike:
            raise RefusedStackError(
                f"{type(layer).__name__} looks like a {self.family.name}, but computes something else than its "
                "attention and feed-forward branches added up. Give its branches: "
                "convert_to_reversible(..., branches=(f, g))."
            ) from cause
        self.compared.add(type(layer))

    def extra_repr(self) -> str:
        """Return a summary of the conversion."""
        return f"schedule={self.schedule}, family={self.family.name}, rewire={self.rewire}, scale={self.scale}"


class Stretch:
    """Reversible layers in a row as a model's loop sees them: one layer to call.

    It also shows numbers and strings that the layers have in common, such as the kind of attention that a model chooses
    their mask by.

    Args:
        stack: what holds the layers.
        number: that of the stretch.
        layers: which of its layers.
    """

    def __init__(self, stack: ReversibleLayers, number: int, layers: range) -> None:
        self.stack, self.number, self.layers = stack, number, layers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run them."""
        return self.stack.run(self.number, self.layers, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        values = [getattr(self.stack[index], name) for index in self.layers]
        if isinstance(values[0], str | int | float | None) and all(value == values[0] for value in values):
            return values[0]
        raise AttributeError(
            f"{name!r} of layers {self.layers.start} to {self.layers.stop - 1}, which run as one reversible stretch "
            "but have different values of it: access each layer by its number, stack[i]."
        )


def _alike(own: Any, added: Tensor, low: bool) -> bool:
    """Return whether a layer's output is that of its branches; both compute the same operators in nearly one order."""
    both = (own[0] if isinstance(own, tuple) else own, added)
    # A fused kernel of the layer may give no number where all keys are masked.
    known = both[0].isfinite()
    first, second = (torch.where(known, out, 0.0).to(torch.promote_types(out.dtype, torch.float32)) for out in both)
    size, off = torch.linalg.vector_norm(first), torch.linalg.vector_norm(first - second)
    return bool(off <= (5e-2 if low else 1e-4) * size + 1e-12)  # half precision rounds to three digits


def _buffers_kept(layer: nn.Module) -> AbstractContextManager[Any]:
    inventory = Inventory(layer, "the layer")
    return inventory.again(inventory.copies(), aliases=False)


@contextlib.contextmanager
def _unheard(layer: nn.Module) -> Iterator[None]:
    """Keep forward hooks within a layer, which may collect outputs, from a run that is not a pass of the model."""
    hooks = [(part, part._forward_hooks) for part in layer.modules()]
    for part, _ in hooks:
        part._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for part, kept in hooks:
            part._forward_hooks = kept


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
