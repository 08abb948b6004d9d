"""One call of a network: with positional or keyword arguments, with or without labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_bpfree.core.replay.batch import rebuilt


class RefusedError(ValueError):
    """A rule does not support a network, or a training step's use of it; the message says how to fix it."""


LABELS = ("labels", "label", "targets", "target")
"""Names of arguments, and keys of batches, that hold labels."""
_BESIDE = ("mask", "label", "target", "position", "token_type", "cache")  # of arguments that are not inputs


class Call(NamedTuple):
    """The arguments of one call of a network; the inputs are separate, for rules that change them.

    Args:
        args: positional arguments, with None in place of the inputs.
        kwargs: keyword arguments, without the inputs.
        at: position or keyword of the inputs.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: int | str = 0

    @classmethod
    def of(cls, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
        """Return the inputs of a call, and everything else.

        The inputs are the first argument. In a call with keywords, they are the first tensor in the order of the
        network's signature that is neither labels nor a mask.

        Args:
            network: the network.
            args: positional arguments.
            kwargs: keywords.

        Raises:
            RefusedError: if no argument is an input tensor.

        Examples:
            >>> import torch
            >>> call = {"attention_mask": torch.ones(2, 3), "input_ids": torch.zeros(2, 3)}
            >>> Call.of(nn.Identity(), (), call)[1].at
            'input_ids'
        """
        if args and isinstance(args[0], Tensor):
            return args[0], cls((None, *args[1:]), dict(kwargs), 0)
        order = [name for name in _parameters(network) if name in kwargs]
        for name in dict.fromkeys([*order, *kwargs]):
            if isinstance(kwargs[name], Tensor) and not any(word in name for word in _BESIDE):
                return kwargs[name], cls(args, {key: v for key, v in kwargs.items() if key != name}, name)
        given = ", ".join([*(type(a).__name__ for a in args), *(f"{k}={type(v).__name__}" for k, v in kwargs.items())])
        cure = " Call it by keywords, network(**batch)." if args and isinstance(args[0], Mapping) else ""
        raise RefusedError(
            f"network: {type(network).__name__} is called with ({given}), none of which is a tensor of inputs.{cure} "
            "Pass the inputs as its first argument, or name the submodule that takes them, network=...."
        )

    def around(self, inputs: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with ``inputs`` in their place."""
        if isinstance(self.at, str):
            return self.args, {self.at: inputs, **self.kwargs}
        return (*self.args[: self.at], inputs, *self.args[self.at + 1 :]), self.kwargs

    def times(self, rows: int, copies: int) -> Call:
        """Return arguments for ``copies`` concatenated batches: tensors of ``rows`` rows are repeated."""

        def repeated(tensor: Tensor) -> Tensor:
            fits = tensor.dim() > 0 and len(tensor) == rows
            return tensor.repeat(copies, *[1] * (tensor.dim() - 1)) if fits else tensor

        if copies == 1:
            return self
        args, kwargs = tree_map_only(Tensor, repeated, (self.args, self.kwargs))
        return Call(args, kwargs, self.at)

    @property
    def labels(self) -> Tensor | None:
        """The labels among the keywords, if there are any."""
        found = [self.kwargs[name] for name in LABELS if isinstance(self.kwargs.get(name), Tensor)]
        return found[0] if found else None

    @property
    def kind(self) -> tuple[Any, ...]:
        """A key that differs between calls whose outputs may have different kinds."""
        given = tuple(sorted(name for name, value in self.kwargs.items() if value is not None))
        return len(self.args), self.at, given, self.kwargs.get("return_dict")


def _parameters(network: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(type(network).forward).parameters)
    except (TypeError, ValueError):
        return []


def scores_of(network: nn.Module, output: Any) -> Tensor:
    """Return the scores in the output of a network.

    Args:
        network: the network, for the error.
        output: a tensor; an object or a mapping with ``logits``; or a tuple, list or mapping with one tensor of
            floating-point numbers that has two or more dimensions.

    Raises:
        RefusedError: if it is unclear which tensor has the scores.

    Examples:
        >>> import torch
        >>> scores_of(nn.Identity(), {"loss": torch.zeros(()), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    parts = list(output.values()) if isinstance(output, Mapping) else output
    parts = list(parts) if isinstance(parts, list | tuple) else []
    found = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 1]
    if len(found) == 1:
        return found[0]
    raise RefusedError(
        f"network: {type(network).__name__} returns a {type(output).__name__} with {len(found)} tensors that could be "
        "scores, and none of them is called 'logits'. Name the submodule that returns them, network=..., or return one "
        "tensor of scores, or an object or a dict that has them as 'logits'."
    )


def with_scores(
    network: nn.Module, output: Any, scores: Tensor, others: Callable[[Tensor], Tensor | None] = lambda tensor: tensor
) -> Any:
    """Return a copy of a network's output with other scores; ``output`` does not change.

    Args:
        network: the network, for errors.
        output: see :func:`scores_of`.
        scores: the new scores.
        others: applied to all other tensors.
    """
    old = scores_of(network, output)
    return rebuilt(output, lambda value: scores if value is old else others(value) if _is_tensor(value) else value)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
