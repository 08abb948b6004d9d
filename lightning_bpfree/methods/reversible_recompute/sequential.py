"""A stack of reversible blocks, trained without storing its activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, overload

from torch import Tensor, nn

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveFloat, PositiveInt, checked
from lightning_bpfree.methods.reversible_recompute.coupling import Coupling, ReversibleBlock, accepted
from lightning_bpfree.methods.reversible_recompute.recomputation import Recomputation, Schedule
from lightning_bpfree.methods.reversible_recompute.stream_fusion import Enter, Fusion, StreamFusion, enter


class ReversibleSequential(nn.Module):
    """A sequence of blocks of two coupled streams, whose inputs are recomputed from their outputs.

    The gradients equal those of plain autograd up to rounding, for every schedule: dropout and stochastic depth draw
    the same numbers again, autocast computes in the same types (streams stay in float32), running statistics are
    updated once, and the caller's random streams end as in plain training. Saved activations do not grow with depth for
    ``"sequential"`` and ``"parallel"``; a step takes one more forward pass of the stack.

    Args:
        blocks: :class:`ReversibleBlock`, at least one.
        schedule: ``"autograd"``, ``"checkpoint"``, ``"sequential"`` or ``"parallel"``; see :class:`Recomputation`.
        enter: how one input becomes two streams: ``"duplicate"``, or ``"split"`` into halves of the channels.
        fusion: how two outputs become one: a mode of :class:`StreamFusion`, a module of two tensors, or None for
            ``"mean"`` after ``"duplicate"`` and ``"concat"`` after ``"split"``.
        dim: dimension of the channels.
        buffer_every: keep the inputs of every n-th block, at least 1; None for none.
        max_error: largest allowed relative error of recovered inputs, above 0; None for any.
        check_every: measure that error in every n-th pass, at least 1.
        store_last: number of blocks at the top that keep their activations, at least 0; saves time at the cost of
            memory.

    Raises:
        ValueError: for arguments out of range.

    Shape:
        - Input: one tensor, or two of one shape; keyword arguments go to the branches whose ``forward`` names them.
          Their tensors may need gradients.
        - Output: one tensor for one input, two for two.

    Examples:
        >>> import torch
        >>> def branch():
        ...     return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
        >>> stack = ReversibleSequential([ReversibleBlock(branch(), branch()) for _ in range(12)])
        >>> stack(torch.randn(2, 8)).square().sum().backward()
        >>> stack.schedule = "parallel"

    References:
        T. Zhu, K. Mangalam, "PaReprop: Fast Parallelized Reversible Backpropagation", 2023, arXiv 2306.09342.
        A. N. Gomez, M. Ren, R. Urtasun, R. B. Grosse, "The Reversible Residual Network", 2017, arXiv 1707.04585.
    """

    @checked
    def __init__(
        self,
        blocks: Iterable[ReversibleBlock],
        schedule: Schedule = "sequential",
        *,
        enter: Enter = "duplicate",
        fusion: Fusion | nn.Module | None = None,
        dim: int = -1,
        buffer_every: PositiveInt | None = None,
        max_error: PositiveFloat | None = None,
        check_every: PositiveInt = 1,
        store_last: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        for index, block in enumerate(blocks):
            if not isinstance(block, ReversibleBlock):
                raise ValueError(
                    f"ReversibleSequential: blocks: block {index} is a {type(block).__name__}; give "
                    "ReversibleBlock(f, g). The layers of an existing "
                    "model are converted by convert_to_reversible or the ReversibleRecompute callback."
                )
            self.add_module(str(index), block)
        if not self._modules:
            raise ValueError("ReversibleSequential: blocks=[] is empty: give at least one ReversibleBlock.")
        self.depth, self.enter, self.dim = len(self._modules), enter, dim
        mode = fusion or ("mean" if enter == "duplicate" else "concat")
        self.fusion = mode if isinstance(mode, nn.Module) else StreamFusion(mode, dim=dim)
        self.recomputation = Recomputation(schedule, buffer_every, max_error, check_every, store_last)

    @property
    def schedule(self) -> Schedule:
        """How activations are recovered; can be set at any time."""
        return self.recomputation.schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self.recomputation.schedule = schedule

    @property
    def reconstruction_error(self) -> float | None:
        """The largest relative error of recovered inputs in the last measurement; None if not measured."""
        return self.recomputation.error

    def __len__(self) -> int:
        return self.depth

    def __iter__(self) -> Iterator[ReversibleBlock]:
        return (self[index] for index in range(self.depth))

    @overload
    def __getitem__(self, index: int) -> ReversibleBlock: ...

    @overload
    def __getitem__(self, index: slice) -> list[ReversibleBlock]: ...

    def __getitem__(self, index: int | slice) -> ReversibleBlock | list[ReversibleBlock]:
        if isinstance(index, slice):
            return [self[i] for i in range(self.depth)[index]]
        block = self._modules[str(range(self.depth)[index])]
        assert isinstance(block, ReversibleBlock)
        return block

    def couplings(self) -> list[Coupling]:
        """Return the blocks as schedules see them."""
        return [block.coupling(f"block {index}") for index, block in enumerate(self)]

    def forward(self, x: Tensor, x2: Tensor | None = None, **context: Any) -> Any:
        """Return the fused output for one input, or both streams for two."""
        couplings = self.couplings()
        _check_names(couplings, context)
        x1, second = enter(x, self.enter, self.dim) if x2 is None else (x, x2)
        y1, y2 = self.recomputation.run(couplings, x1, second, context)
        return self.fusion(y1, y2) if x2 is None else (y1, y2)

    def extra_repr(self) -> str:
        """Return the schedule."""
        return f"schedule={self.schedule}"


def _check_names(couplings: list[Coupling], context: dict[str, Any]) -> None:
    for key in context:
        names = [accepted(branch) for coupling in couplings for branch in (coupling.f, coupling.g)]
        if not any(accepts is None or key in accepts for accepts in names):
            raise TypeError(
                f"no branch of the reversible stack takes the keyword argument {key!r}; its branches take "
                f"{', '.join(sorted({name for accepts in names for name in accepts or ()})) or 'none'}."
            )
