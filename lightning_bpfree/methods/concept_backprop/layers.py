"""Layers by name, and their output activations in a forward pass."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_bpfree.core.block_hooks import on_first_tensor
from lightning_bpfree.methods.concept_backprop.frozen import Forward, evaluate

Pool = Literal["flatten", "mean", "last"] | Callable[[Tensor], Tensor]
Edit = Callable[[Tensor], Tensor]


class _AllSeen(Exception):  # noqa: N818  # no error: it leaves a forward pass whose rest is not needed
    pass


class Pass(NamedTuple):
    """What one forward pass has shown.

    Args:
        features: the activations of every layer, one row a sample, ``(B, D)``.
        output: the first tensor that the module returned; None if the pass ended at the last layer.
    """

    features: dict[str, Tensor]
    output: Tensor | None


def find_layers(module: nn.Module, layers: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the submodules that names or shell-style patterns stand for, in the order of registration.

    Raises:
        ValueError: for a name or pattern that fits nothing; the message lists the nearest names.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> list(find_layers(net, ["0", "2"])), list(find_layers(net, "*"))
        (['0', '2'], ['0', '1', '2'])
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    named = {name: part for name, part in module.named_modules() if name}
    if not patterns:
        raise ValueError(f"layers=[]: name one layer at least, such as {list(named)[:5]}.")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            close = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or list(named)[:10]
            raise ValueError(
                f"layers: {pattern!r} is not a submodule of {type(module).__name__}; the nearest names are "
                f"{', '.join(map(repr, close))}."
            )
    return {name: part for name, part in named.items() if any(fnmatchcase(name, p) for p in patterns)}


def pooled(activation: Tensor, pool: Pool, name: str = "layer") -> Tensor:
    """Return one row of features a sample, ``(B, D)``, of activations ``(B, ...)``.

    Args:
        activation: what leaves a layer.
        pool: ``"flatten"``: all values; ``"mean"``: over the positions of ``(B, C, H, W)`` or ``(B, T, D)``;
            ``"last"``: the last position of ``(B, T, D)``; or a function of the activations.
        name: name of the layer, for errors.

    Raises:
        ValueError: for activations of a shape that ``pool`` does not take.

    Examples:
        >>> import torch
        >>> pooled(torch.zeros(2, 3, 4, 4), "mean").shape, pooled(torch.zeros(2, 5, 3), "last").shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    if callable(pool):
        made = pool(activation)
    elif pool == "flatten" or (activation.dim() == 2 and pool == "mean"):
        made = activation.flatten(1) if activation.dim() > 1 else activation[:, None]
    elif pool == "mean" and activation.dim() in (3, 4):
        made = activation.mean((2, 3) if activation.dim() == 4 else 1)
    elif pool == "last" and activation.dim() == 3:
        made = activation[:, -1]
    else:
        raise ValueError(
            f"pool={pool!r} takes no activations of shape {tuple(activation.shape)}, which layer {name!r} gives: use "
            "pool='flatten', or a function from activations to features of shape (B, D)."
        )
    if made.dim() != 2 or len(made) != len(activation):
        raise ValueError(f"pool gives {tuple(made.shape)} for {tuple(activation.shape)} of {name!r}; needed is (B, D).")
    return made


def spread(shift: Tensor, activation: Tensor, pool: Pool) -> Tensor:
    """Return the change of the activations that moves their pooled features by ``shift``, and no more than needed."""
    if pool == "flatten" or (activation.dim() == 2 and pool == "mean"):
        return shift.reshape(activation.shape)
    if pool == "mean":
        return (shift[:, :, None, None] if activation.dim() == 4 else shift[:, None]).expand(activation.shape)
    if pool == "last":
        change = activation.new_zeros(activation.shape)
        change[:, -1] = shift
        return change
    raise ValueError("pool: a function cannot be turned round; use 'flatten', 'mean' or 'last' to measure sensitivity.")


def run(
    module: nn.Module,
    inputs: Any,
    layers: Mapping[str, nn.Module],
    *,
    pool: Pool = "flatten",
    forward: Forward = None,
    whole: bool = False,
    edits: Mapping[str, Edit] | None = None,
) -> Pass:
    """Run the module, and return the features of the layers.

    Args:
        module: the module, which should be frozen.
        inputs: its inputs, number of samples first.
        layers: by name, of :func:`find_layers`.
        pool: from activations to features.
        forward: how the module is evaluated.
        whole: run to the end; else the pass ends as soon as all layers have run.
        edits: replace the first tensor that leaves a layer, after its features have been taken.

    Raises:
        ValueError: if a layer does not run, runs twice, or gives another number of rows than samples.
    """
    features: dict[str, Tensor] = {}
    rows = _rows(inputs)

    def leave(name: str, _module: nn.Module, _args: Any, output: Any) -> Any:
        def seen(activation: Tensor) -> Tensor:
            if name in features:
                raise ValueError(f"layer {name!r} runs twice in one forward pass: probe a layer that runs once.")
            if rows is not None and len(activation) != rows:
                raise ValueError(
                    f"layer {name!r} gives {tuple(activation.shape)} for {rows} samples; their number must come first "
                    "(batch_first=True). A rule that folds labels into the batch needs prediction='readout'."
                )
            # A copy, since a layer that works in place may come next and change what is seen here.
            ends = not whole and len(features) + 1 == len(layers)
            features[name] = pooled(activation if ends else activation.clone(), pool, name)
            return edits[name](activation) if edits and name in edits else activation

        made = on_first_tensor(seen, output, f"leaves {name}")
        if not whole and len(features) == len(layers):
            raise _AllSeen
        return made

    output = None
    with _hooked({name: partial(leave, name) for name in layers}, layers), contextlib.suppress(_AllSeen):
        output = evaluate(module, inputs, forward)
    missing = [name for name in layers if name not in features]
    if missing:
        raise ValueError(f"layers {missing} do not run in the forward pass; containers such as ModuleList never do.")
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return Pass({name: features[name] for name in layers}, tensors[0] if tensors else None)


@contextlib.contextmanager
def _hooked(hooks: Mapping[str, Callable[..., Any]], layers: Mapping[str, nn.Module]) -> Iterator[None]:
    handles = [layers[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(inputs: Any) -> int | None:
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors else None
