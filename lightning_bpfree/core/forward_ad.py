"""Directional derivatives by forward-mode automatic differentiation, and operations that do not support it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_bpfree.core.arguments import checked
from lightning_bpfree.core.params import Params

LossFunction = Callable[[Params], Tensor]


class NoForwardDerivativeError(Exception):
    """The loss has no forward-mode derivative; the message names the layer and a fix."""


@checked
def directional_derivative(
    loss_fn: LossFunction, params: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the loss and its derivative along ``direction``, both scalars, in one pass without a graph.

    Args:
        loss_fn: the loss as a function of named parameters.
        params: the point, as detached tensors.
        direction: the direction; same names and shapes.

    Raises:
        NoForwardDerivativeError: if no tangent reaches the loss, which would otherwise look like a derivative of 0.

    Examples:
        >>> at, along = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}
        >>> directional_derivative(lambda p: (p["w"] ** 2).sum(), at, along)
        (tensor(5.), tensor(2.))
    """
    with torch.set_grad_enabled(False), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(param, direction[name]) for name, param in params.items()}
        with _stopped_gradients_stop_tangents():
            dual = loss_fn(duals)
        loss, slope = _unpacked(dual)
        return loss.detach(), slope.detach()


def _unpacked(dual: Tensor) -> tuple[Tensor, Tensor]:
    loss, slope = forward_ad.unpack_dual(dual)
    if slope is None:
        raise NoForwardDerivativeError(
            "No tangent arrives at the loss: the training step cuts its dependence on the parameters (argmax, "
            "accuracy, NumPy, .item(), detach, or a reentrant checkpoint). ZerothOrder() needs no derivative."
        )
    return loss, slope


@checked
def directional_derivatives(
    loss_fn: LossFunction, params: Mapping[str, Tensor], directions: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the loss and its derivatives along ``C`` stacked directions, in one vectorized pass without a graph.

    Work that does not depend on the direction is done once: ``1 + 2 C`` forward passes instead of ``3 C``, at the
    cost of ``C`` times the memory for directions and activations.

    Args:
        loss_fn: the loss as a function of named parameters; it must not write to tensors that it captures.
        params: the point, as detached tensors.
        directions: named tensors of shape ``(C, *shape)``.

    Returns:
        The loss, a scalar, and the derivatives, shape ``(C,)``.

    Raises:
        NoForwardDerivativeError: if no tangent reaches the loss.
    """

    def stopped(duals: Params) -> Tensor:
        with _stopped_gradients_stop_tangents():
            loss = loss_fn(duals)
        _unpacked(loss)  # a transform would read a loss without tangent as a derivative of 0
        return loss

    def along(direction: Params) -> tuple[Tensor, Tensor]:
        loss, slope = torch.func.jvp(stopped, (dict(params),), (direction,))  # type: ignore[misc]  # has_aux=False
        return loss, slope

    with torch.set_grad_enabled(False), warnings.catch_warnings():
        # Where vmap has no batching rule it loops inside, and warns at every call.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # randomness="same": one dropout mask for all directions
        losses, slopes = torch.func.vmap(along, randomness="same")(dict(directions))
    return losses[0], slopes


@checked
@contextlib.contextmanager
def supported_kernels(module: nn.Module) -> Iterator[None]:
    """Use only kernels that have a forward derivative.

    Attention uses its math kernel, LSTMs on the CPU do not use oneDNN, and transformer layers do not use their fused
    evaluation path. Reentrant checkpoints would silently drop the tangent, so they raise in this context.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(plain_attention())
        if any(isinstance(part, nn.LSTM) for part in module.modules()):
            # `mkldnn.flags` would set allow_tf32 too, and warn about it on builds for other devices. Newer versions of
            # set_flags also reset the precision, the last of what they return, which goes back with the switch.
            enabled, *others = torch.backends.mkldnn.set_flags(False)
            precision = [None, None, others[2]] if len(others) > 2 else []
            stack.callback(torch.backends.mkldnn.set_flags, enabled, *precision)
        stack.enter_context(_no_reentrant_checkpoint())
        yield


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Use the math kernel of attention: fused kernels have neither a forward derivative nor a batching rule."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _stopped_gradients_stop_tangents() -> Iterator[None]:
    """Let ``torch.no_grad`` and ``torch.set_grad_enabled`` switch forward mode too: a training step means both."""
    enabled = torch._C._is_fwd_grad_enabled()
    kinds: list[tuple[Any, str]] = [(torch.no_grad, "__enter__"), (torch.set_grad_enabled, "__init__")]
    own = [(kind, name, getattr(kind, name)) for kind, first in kinds for name in (first, "__exit__")]
    for kind, first in kinds:
        setattr(kind, first, _then_switch(getattr(kind, first)))
        kind.__exit__ = _then_switch_back(kind.__exit__)
    try:
        yield
    finally:
        for kind, name, method in own:
            setattr(kind, name, method)
        torch._C._set_fwd_grad_enabled(enabled)


def _then_switch(method: Callable[..., None]) -> Callable[..., None]:
    def switched(self: Any, *args: Any) -> None:
        self._tangents = torch._C._is_fwd_grad_enabled()
        method(self, *args)
        torch._C._set_fwd_grad_enabled(bool(getattr(self, "mode", False)))  # no_grad has no mode

    return switched


def _then_switch_back(method: Callable[..., None]) -> Callable[..., None]:
    def switched(self: Any, *exception: Any) -> None:
        method(self, *exception)
        torch._C._set_fwd_grad_enabled(self._tangents)

    return switched


@contextlib.contextmanager
def _no_reentrant_checkpoint() -> Iterator[None]:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise NoForwardDerivativeError(
            "Activation checkpointing with use_reentrant=True drops the tangents of forward-mode AD: pass "
            "use_reentrant=False, or switch checkpointing off (a forward gradient stores no activations anyway)."
        )

    checkpoint: Any = torch.utils.checkpoint.CheckpointFunction
    had_own = "apply" in checkpoint.__dict__
    original = checkpoint.__dict__.get("apply")
    checkpoint.apply = refuse
    try:
        yield
    finally:
        if had_own:
            checkpoint.apply = original
        else:
            del checkpoint.apply


def unsupported_layers(module: nn.Module, trained: Iterable[Tensor]) -> list[tuple[str, str]]:
    """Return (layer, fix) for every layer with ``trained`` parameters that has no forward derivative in torch."""
    found = []
    moving = {id(parameter) for parameter in trained}
    for name, part in module.named_modules():
        own = [*part.parameters(recurse=False), *(p for sub in _parametrized(part) for p in sub.parameters())]
        if not any(id(parameter) in moving for parameter in own):
            continue
        label = f"{name or type(part).__name__} ({type(part).__name__})"
        if isinstance(part, nn.EmbeddingBag):
            found.append((label, "use nn.Embedding followed by a sum or mean"))
        kinds = {type(p).__name__ for listed in _parametrized(part) for p in listed.children()}
        for kind in kinds & {"_WeightNorm", "_SpectralNorm"}:
            found.append((label, f"remove {kind.strip('_')} (torch.nn.utils.parametrize.remove_parametrizations)"))
        hooks = {type(hook).__name__ for hook in part._forward_pre_hooks.values()}
        for kind, function in (("WeightNorm", "remove_weight_norm"), ("SpectralNorm", "remove_spectral_norm")):
            if kind in hooks:
                found.append((label, f"remove {kind} (torch.nn.utils.{function})"))
    return found


def _parametrized(part: nn.Module) -> list[nn.Module]:
    parametrizations = getattr(part, "parametrizations", None)
    return list(parametrizations.values()) if isinstance(parametrizations, nn.ModuleDict) else []


def compiled_parts(module: nn.Module) -> list[str]:
    """Return the names of submodules wrapped by torch.compile; compiled code may silently drop tangents."""
    return [
        name or type(module).__name__
        for name, part in module.named_modules()
        if type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None
    ]


def failing_layer(module: nn.Module, evaluate: Callable[[], object]) -> tuple[Exception | None, str | None]:
    """Return what ``evaluate`` raises and "name (Type)" of the innermost layer that raises; None if there is none."""
    stack: list[str] = []
    labels = {
        id(part): f"{name or type(part).__name__} ({type(part).__name__})" for name, part in module.named_modules()
    }

    def left(*_: Any) -> None:
        stack.pop()

    # Hooks of all modules: those of one module would be put back to what they were when the step began.
    handles = [
        register_module_forward_pre_hook(lambda part, *_: stack.append(labels.get(id(part), type(part).__name__))),
        register_module_forward_hook(left),
    ]
    try:
        evaluate()
    except Exception as error:
        return error, stack[-1] if stack else None
    finally:
        for handle in handles:
            handle.remove()
    return None, None
