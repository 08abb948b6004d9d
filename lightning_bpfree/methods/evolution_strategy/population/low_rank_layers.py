"""Standard layers that add each member's low-rank noise to their output, with their weight shared by all members."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.methods.evolution_strategy.population.low_rank_population import Factors

try:  # what vmap itself is made of; without it the layers below compute the same by ordinary operations, more slowly
    from torch._C._functorch import _add_batch_dim, get_unwrapped, is_batchedtensor, maybe_get_bdim, maybe_get_level

    _INSIDE_VMAP = True
except ImportError:  # pragma: no cover
    _INSIDE_VMAP = False

_FEW = 16  # samples a member

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class LowRankLayers:
    """The linear, convolution and embedding layers of a module whose weights can carry low-rank noise.

    A layer qualifies if it uses the standard forward of its class, and if nothing else reads its weight;
    :meth:`observed` finds this out in one evaluation. The weights of all other layers are replaced by those of the
    members, one matrix each.

    Args:
        slots: the parameters of the module.
        names: parameters whose noise is of low rank.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        >>> LowRankLayers(ParameterSlots(net), {"0.weight"}).names
        {'0.weight'}
    """

    def __init__(self, slots: ParameterSlots, names: set[str]) -> None:
        self.layers: dict[str, nn.Module] = {}
        self._own: dict[str, Tensor] = {}
        for slot in slots:
            owner, key = slot.places[0]
            if slot.name in names and len(slot.places) == 1 and key == "weight" and _is_standard(owner):
                self.layers[slot.name], self._own[slot.name] = owner, slot.parameter

    @property
    def names(self) -> set[str]:
        """Names of the weights that need no replacement."""
        return set(self.layers)

    @contextlib.contextmanager
    def observed(self, params: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        """Within an evaluation with the yielded tensors, find out which weights something else uses, and drop them.

        Args:
            params: the present parameters, detached.
        """
        strays: set[str] = set()
        observed = {name: _ObservedWeight.of(params[name], partial(strays.add, name)) for name in self.layers}
        with contextlib.ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(_forward(layer, partial(_plain, layer, params[name])))
            yield observed
        for name in strays:
            del self.layers[name]

    def watched(self, strays: set[str]) -> dict[str, Tensor]:
        """Return the layers' weights as tensors that add their names to ``strays`` where something else uses them.

        The layers' own forward passes within :meth:`perturbed` do not count.
        """
        return {name: _ObservedWeight.of(self._own[name].detach(), partial(strays.add, name)) for name in self.layers}

    @contextlib.contextmanager
    def perturbed(self, factors: Mapping[str, Factors], weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the layers add the noise of one member, within a vmap over members.

        Args:
            factors: by name of the weight, as one member sees them: ``(rows, rank)`` and ``(columns, rank)``.
            weights: what :meth:`watched` has returned, in the place of the parameters.
        """
        with contextlib.ExitStack() as stack:
            for name, noise in factors.items():
                layer = self.layers[name]
                stack.enter_context(_forward(layer, partial(_unwatched, layer, noise, weights[name])))
            yield


def _is_standard(layer: Any) -> bool:
    if "forward" in layer.__dict__:
        return False
    kinds: list[Any] = [nn.Linear, nn.Embedding, *_CONVOLUTIONS]
    if all(type(layer).forward is not kind.forward for kind in kinds):
        return False
    if isinstance(layer, nn.modules.conv._ConvNd):
        return bool(layer.groups == 1 and layer.padding_mode == "zeros")
    return not isinstance(layer, nn.Embedding) or layer.max_norm is None


@contextlib.contextmanager
def _forward(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = layer.__dict__.get("forward")
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            layer.__dict__.pop("forward", None)
        else:
            layer.__dict__["forward"] = own


class _ObservedWeight(Tensor):
    """A weight that reports when an operation reads it."""

    _seen: Callable[[], None]

    @classmethod
    def of(cls, tensor: Tensor, seen: Callable[[], None]) -> _ObservedWeight:
        observed = tensor.as_subclass(cls)
        observed._seen = seen
        return observed

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):
            for leaf in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, cls):
                    leaf._seen()
        return result.as_subclass(Tensor) if isinstance(result, cls) else result


# --- the layers -------------------------------------------------------------------------------------------------------


def _plain(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if isinstance(layer, nn.Embedding):
        return _embedding(layer, x, weight)
    return _convolution(layer, x, weight, layer.bias)


def _unwatched(layer: Any, noise: Factors, own: Tensor, x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return _perturbed(layer, noise, own, x)


def _perturbed(layer: Any, noise: Factors, own: Tensor, x: Tensor) -> Tensor:
    if layer._parameters["weight"] is not own:  # called with other weights, such as a teacher's: they have no noise
        return _plain(layer, layer.weight, x)
    if isinstance(layer, nn.Embedding):
        return _embedding(layer, x, layer.weight) + _embedding(layer, x, noise.left) @ noise.right.mT
    plain = _is_plain_vmap(noise.left, x, layer.bias)
    if isinstance(layer, nn.Linear):
        if plain:
            return _linear_at_once(layer, noise, x)
        y = F.linear(x, layer.weight) + (x @ noise.right) @ noise.left.mT
        return y if layer.bias is None else y + layer.bias
    if plain and x.dim() == layer.weight.dim():
        return _convolution_at_once(layer, noise, x)
    places = layer.weight.dim() - 2
    inner = _convolution(layer, x, noise.right.mT.unflatten(1, layer.weight.shape[1:]), None)
    outer = torch.tensordot(noise.left, inner.movedim(-places - 1, 0), 1).movedim(0, -places - 1)
    convolved: Tensor = _convolution(layer, x, layer.weight, None) + outer
    return convolved if layer.bias is None else convolved + layer.bias.view(-1, *[1] * places)


def _linear_at_once(layer: nn.Linear, noise: Factors, x: Tensor) -> Tensor:
    """Compute ``x W^T + (x B) A^T + bias`` for all members: a vmapped sum would go over memory once more a term."""
    left, right = _unwrapped(noise.left), _unwrapped(noise.right)
    members, columns, rank = right.shape
    if is_batchedtensor(x):
        rows = _unwrapped(x)
        lead = rows.shape[1:-1]
        rows = rows.reshape(members, -1, columns)
        y = F.linear(rows.flatten(0, 1), layer.weight).view(members, -1, layer.out_features)
        inner = _inner(rows, right.to(rows.dtype))
        y = _add_product(y, inner, left)
    else:  # all members see the same input: one product serves them all
        lead, rows = x.shape[:-1], x.reshape(-1, columns)
        shared = F.linear(rows, layer.weight).expand(members, -1, -1)
        inner = rows @ right.transpose(0, 1).reshape(columns, -1).to(rows.dtype)
        inner = inner.view(-1, members, rank).transpose(0, 1)
        y = torch.baddbmm(shared, inner.to(shared.dtype), left.mT.to(shared.dtype))
    if layer.bias is not None:
        bias = _unwrapped(layer.bias)  # one for each member where the search moves it
        y += bias.unsqueeze(1) if is_batchedtensor(layer.bias) else bias
    return _wrapped(y.view(members, *lead, layer.out_features), noise.left)


def _inner(rows: Tensor, right: Tensor) -> Tensor:
    if right.shape[2] == 1 and rows.shape[1] <= _FEW:  # batched products of vectors are slow
        return (rows * right.mT).sum(-1, keepdim=True)
    return torch.bmm(rows, right)


def _add_product(y: Tensor, inner: Tensor, left: Tensor) -> Tensor:
    """Add ``inner @ left^T`` to ``y`` in place."""
    inner, left = inner.to(y.dtype), left.mT.to(y.dtype)
    return y.addcmul_(inner, left) if inner.shape[2] == 1 else y.baddbmm_(inner, left)


def _convolution_at_once(layer: Any, noise: Factors, x: Tensor) -> Tensor:
    """Convolve with the shared weight, and with the ``rank`` filters of each member, which 1x1 factors then mix."""
    left, right = _unwrapped(noise.left), _unwrapped(noise.right)
    members, _, rank = left.shape
    filters = right.mT.reshape(members * rank, *layer.weight.shape[1:])
    if is_batchedtensor(x):
        rows = _unwrapped(x)
        y = _convolution(layer, rows.flatten(0, 1), layer.weight, None).unflatten(0, rows.shape[:2])
        grouped = rows.transpose(0, 1).flatten(1, 2)
        inner = _convolution(layer, grouped, filters.to(rows.dtype), None, groups=members)
    else:
        y = _convolution(layer, x, layer.weight, None).expand(members, *[-1] * x.dim())
        inner = _convolution(layer, x, filters.to(x.dtype), None)
    inner = inner.unflatten(1, (members, rank)).transpose(0, 1).flatten(3)  # (members, batch, rank, places)
    y = y + torch.matmul(left.unsqueeze(1).to(inner.dtype), inner).view(y.shape)
    if layer.bias is not None:
        bias = _unwrapped(layer.bias)
        y += bias.view(-1, *([1] if is_batchedtensor(layer.bias) else []), y.shape[2], *[1] * (y.dim() - 3))
    return _wrapped(y, noise.left)


def _convolution(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    convolve = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(layer, kind))
    return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def _embedding(layer: nn.Embedding, x: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(x, weight, layer.padding_idx, None, 2.0, layer.scale_grad_by_freq, layer.sparse)


# --- vmap from within -------------------------------------------------------------------------------------------------


def _is_plain_vmap(noise: Tensor, *others: Tensor | None) -> bool:
    """Whether the tensors belong to the vmap over members or to none; not to one that the module itself runs."""
    if not _INSIDE_VMAP or not is_batchedtensor(noise) or is_batchedtensor(get_unwrapped(noise)):
        return False
    batched = [other for other in others if other is not None and is_batchedtensor(other)]
    level = maybe_get_level(noise)
    return all(maybe_get_level(b) == level and not is_batchedtensor(get_unwrapped(b)) for b in batched)


def _unwrapped(tensor: Tensor) -> Tensor:
    return get_unwrapped(tensor).movedim(maybe_get_bdim(tensor), 0) if is_batchedtensor(tensor) else tensor


def _wrapped(tensor: Tensor, like: Tensor) -> Tensor:
    return _add_batch_dim(tensor, 0, maybe_get_level(like))
