"""One mini-batch as a training rule sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.core.exchange import ScalarExchange
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.core.params import ParameterSlots, Params, Slot
from lightning_bpfree.core.replay.batch import BatchCopies, rebuilt
from lightning_bpfree.core.replay.replay import Replay

Gradients = Params | Callable[[Tensor | None], Params]


class Estimate(NamedTuple):
    """A rule's result for one mini-batch.

    Args:
        loss: the scalar that is reported; it carries a graph when ``gradients`` is None.
        gradients: named gradients, or a function that computes them on demand, called with a scalar factor (or None).
            None lets autograd differentiate ``loss``.
        metrics: further numbers of the step, logged as ``bpfree/<rule>/<name>``.
        informative: False if nothing was learned from the batch: its gradients are zeros, and move no parameter.
    """

    loss: Tensor
    gradients: Gradients | None = None
    metrics: Mapping[str, Tensor | float] = {}
    informative: bool = True

    def resolved(self, scale: Tensor | None = None) -> Params:
        """Return the named gradients times ``scale``; only for an estimate that has gradients."""
        if self.gradients is None:
            raise ValueError("this estimate leaves its gradients to autograd")
        # A pass over the parameters is saved where looking at the scale makes no device wait.
        if scale is not None and scale.device.type == "cpu" and bool(scale == 1):
            scale = None
        if not isinstance(self.gradients, dict):
            return self.gradients(scale)
        return self.gradients if scale is None else {name: grad * scale for name, grad in self.gradients.items()}


class SkipBatchError(Exception):
    """The user's training step returned None, so the batch is skipped."""


class NonFiniteLossError(Exception):
    """One of the numbers that a rule measures is NaN or infinite.

    Args:
        index: the index ``k`` of the direction; None for the unperturbed loss.
        value: the number.
        what: a description of any other number.
    """

    def __init__(self, index: int | None, value: float, what: str | None = None) -> None:
        self.index, self.value = index, value
        which = what or ("the unperturbed loss" if index is None else f"the evaluation of direction k={index}")
        super().__init__(f"{which} gave {value}")


class Step:
    """One mini-batch: the user's training step as a function of the parameters, and the exchange between ranks.

    Args:
        module: the module in training.
        evaluate: the user's training step, called with the arguments of this batch.
        slots: the parameters that the rule may train.
        seed: equal on all ranks, new for every batch, and reproduced after a resume.
        args: positional arguments of the training step.
        kwargs: its keyword arguments.
        replay: restores state between evaluations; None if the rule evaluates once.
        copies: the batch, for a step that is evaluated several times; None makes it from ``args`` and ``kwargs``.
        needs_graph: whether the training step itself computes gradients, for which gradients must be enabled.
        vectorizable: False for a training step that writes to parameters, which vectorized passes do not allow.
        quiet: a context in which the module logs nothing.
        exchange: how ranks agree on measured numbers; None if they do not (one device, or gradients are averaged).
        read: returns the scalar to minimize from the output of the training step.
    """

    def __init__(
        self,
        module: nn.Module,
        evaluate: Callable[..., Any],
        slots: ParameterSlots,
        seed: int,
        *,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        replay: Replay | None = None,
        copies: BatchCopies | None = None,
        needs_graph: bool = False,
        vectorizable: bool = True,
        quiet: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        exchange: ScalarExchange | None = None,
        read: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.module, self.seed, self.needs_graph, self._vectorizable = module, seed, needs_graph, vectorizable
        self._arguments = (args, dict(kwargs or {}))
        self._as_given = args if replay is not None else rebuilt(args, lambda tensor: tensor)
        self._copies = BatchCopies(*self._arguments) if copies is None and replay is not None else copies
        self.slots, self.exchange, self._read = slots, exchange, loss_of if read is None else read
        self._evaluate, self._replay, self._quiet = evaluate, replay, quiet
        self._trained: list[Slot] | None = None
        self._recorded = False
        self.output: Any = None
        self.recorded_loss: Tensor | None = None
        self.forward_evals = 0.0

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments of the training step, batch first, with containers as they were at its start."""
        return self._as_given if self._copies is None else self._copies.fresh()[0]

    @property
    def trained(self) -> list[Slot]:
        """The slots that the rule trains in this step: selected, and currently requiring a gradient."""
        if self._trained is None:
            self._trained = self.slots.trainable()
        return self._trained

    @property
    def params(self) -> Params:
        """The parameters that the rule trains, detached, by name; tied weights once."""
        return {slot.name: slot.parameter.detach() for slot in self.trained}

    def loss(
        self, params: Mapping[str, Tensor] | None = None, *, recorded: bool | None = None, cost: float = 1.0
    ) -> Tensor:
        """Return the user's loss at ``params`` (None for the current parameters), a scalar.

        All evaluations of one step use the same random numbers and start from the same buffers. Exactly one of them,
        the recorded one, has side effects: it logs, updates metrics, and advances buffers and random streams.

        Args:
            params: named tensors to compute with; the module's own are not modified.
            recorded: whether this is the recorded evaluation; by default, the first one at the current parameters.
            cost: the cost of the evaluation in forward passes (a dual forward is 3).

        Raises:
            SkipBatchError: the training step returned None.
            ValueError: the training step did not return one number.
        """
        if recorded is None:
            recorded = params is None
        recorded = recorded and not self._recorded
        self.forward_evals += cost
        try:
            output = self._evaluated(params, recorded)
        except RuntimeError as error:
            if self.needs_graph or "does not require grad" not in str(error):
                raise
            self.needs_graph = True  # from now on known: the step itself computes gradients
            output = self._evaluated(params, recorded)
        loss = self._read(output)
        if self.needs_graph and not torch.is_grad_enabled():
            loss = loss.view_as(loss)  # the graph was the step's own; `detach` would drop a tangent too
        if recorded:
            self._recorded, self.output, self.recorded_loss = True, output, loss
            if self._replay is not None:
                self._replay.keep()
        return loss

    def _evaluated(self, params: Mapping[str, Tensor] | None, recorded: bool) -> Any:
        self.rewind()
        if params is not None and self.needs_graph:  # a penalty may differentiate with respect to parameters
            with torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext():  # no_grad drops tangents
                params = {name: tensor.view_as(tensor).requires_grad_() for name, tensor in params.items()}
        replaced = contextlib.nullcontext() if params is None else self.slots.replaced(params)
        with replaced, contextlib.nullcontext() if recorded else self._traceless():
            return self._output(recorded)

    @property
    def unvectorizable(self) -> str | None:
        """The reason why the training step cannot be vectorized; None if it can."""
        if not self._vectorizable:
            return "the training step writes to parameters"
        return "the training step itself computes gradients" if self.needs_graph else None

    @property
    def recorded(self) -> bool:
        """Whether the recorded evaluation has taken place."""
        return self._recorded

    def rewind(self) -> None:
        """Restore the state from which every evaluation of this step starts."""
        if self._replay is not None:
            self._replay.rewind()

    def loss_under_transform(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the loss inside a torch.func transform, which must not write to tensors outside it.

        Buffers are replaced by copies during the evaluation. Call :meth:`rewind` before the transform, not inside it.
        """
        with self.slots.replaced(params), self._traceless():
            return self._read(self._output(recorded=False))

    def _output(self, recorded: bool) -> Any:
        args, kwargs = self._arguments
        if self._copies is not None:
            args, kwargs = self._copies.original() if recorded else self._copies.fresh()
        with torch.enable_grad() if self.needs_graph else contextlib.nullcontext():
            return self._evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within an evaluation, compute something without side effects on buffers, random streams, logs or metrics."""
        with contextlib.nullcontext() if self._replay is None else self._replay.aside(), self._quiet():
            yield

    @contextlib.contextmanager
    def _traceless(self) -> Iterator[None]:
        copies = contextlib.nullcontext() if self._replay is None else self._replay.buffers.copies()
        with copies, self._quiet():
            yield

    def measure(self, num: int, evaluate: Callable[[Sequence[int]], Tensor], *, infinite: bool = False) -> Tensor:
        """Return ``num`` numbers, shape ``(num,)``, on which all ranks agree.

        Args:
            num: how many numbers.
            evaluate: measures the numbers of the given indices on this rank, in their order.
            infinite: whether infinite numbers are allowed, for callers that only compare them.

        Raises:
            NonFiniteLossError: if a number is NaN or (unless allowed) infinite, with its index.
        """
        share = range(num) if self.exchange is None else self.exchange.share(num)
        values, own = evaluate(share), self.recorded_loss
        if own is not None:
            # A broken loss spoils the numbers, so that all ranks learn of it from what they exchange anyway.
            values = torch.where(_broken(own, infinite).to(values.device), float("nan"), values)
        if self.exchange is not None:
            values = self.exchange.agree(values, num)
        broken = _broken(values, infinite)
        if bool(broken.any()):
            if own is not None and bool(_broken(own, infinite)):
                raise NonFiniteLossError(None, float(own.detach()))
            index = int(broken.nonzero()[0])
            raise NonFiniteLossError(index, float(values[index]))
        return values

    def undo(self) -> None:
        """Undo the step's changes to buffers, such as running means: its batch is skipped."""
        if self._replay is not None:
            self._replay.undo()

    def finish(self) -> None:
        """Leave random streams, buffers and metrics as the recorded evaluation left them."""
        if self._replay is not None:
            self._replay.finish()


def check_finite(named: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteLossError if a tensor has a NaN or infinite number; synchronizes with the device once.

    Args:
        named: tensors by a description, for the error.
    """
    if not named:
        return
    # A sum is NaN or infinite if one of its terms is; one that is so by its size alone is of no use either.
    sums = [tensor.detach().sum(dtype=widest(tensor)) for tensor in named.values()]
    values = torch.stack([total.to(sums[0].device, torch.float64) for total in sums])
    broken = _broken(values, False)
    if bool(broken.any()):
        index = int(broken.nonzero()[0])
        raise NonFiniteLossError(None, float(values[index]), what=list(named)[index])


def widest(tensor: Tensor) -> torch.dtype:
    """Return the type in which to sum a tensor: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _broken(numbers: Tensor, infinite: bool) -> Tensor:
    """Whether numbers are NaN or, unless ``infinite`` ones are let through, infinite."""
    return torch.isnan(numbers) if infinite else ~torch.isfinite(numbers)


def loss_of(output: Any) -> Tensor:
    """Return the scalar loss from the output of a training step.

    Args:
        output: a one-element tensor, a number, or a mapping with the key ``"loss"``.

    Raises:
        SkipBatchError: for None.
        RefusedError: for anything else; a ValueError.
    """
    loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    if loss is None:
        raise SkipBatchError
    if not isinstance(loss, Tensor):
        try:
            return torch.tensor(float(loss), dtype=torch.float64)  # a difference needs the digits
        except (TypeError, ValueError):
            raise RefusedError(
                f"training_step returned {type(loss).__name__}: return one number (a scalar tensor, a float, or a dict "
                "with the key 'loss'), or None to skip the batch."
            ) from None
    if not loss.is_floating_point():
        loss = loss.float()  # a count of right answers
    if loss.numel() != 1:
        raise RefusedError(
            f"training_step returned a loss of shape {tuple(loss.shape)}: a training rule needs one number per batch; "
            "return loss.mean()."
        )
    return loss.reshape(()) if loss.dim() else loss
