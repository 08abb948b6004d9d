"""The right-hand side of the sampling ODE: a network's guided prediction in the variables of the solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_bpfree.methods.diffusion_adjoint.schedules import Node

Conditioning = Mapping[str, Tensor]
"""Keyword arguments of the network, each with the batch first; a batch of 1 stands for all samples."""

Denoiser = Callable[..., Any]
"""``denoiser(x, time, **conditioning)``: x of shape (B, ...), time of shape (B,); returns a prediction shaped as x."""

Prediction = Literal["epsilon", "sample", "v_prediction", "score", "flow_prediction"]


def derivative(prediction: str, output: Tensor, x: Tensor, node: Node) -> Tensor:
    """Return ``dy/drho`` from a network's prediction: the noise, or the velocity of a flow.

    Args:
        prediction: ``"epsilon"`` (the noise), ``"sample"`` (the data), ``"v_prediction"``, ``"score"``, or
            ``"flow_prediction"`` (noise - data).
        output: of the network, shaped as x.
        x: its input.
        node: where.

    Raises:
        ValueError: for an unknown prediction.

    Examples:
        >>> from lightning_bpfree.methods.diffusion_adjoint.schedules import LinearVP
        >>> node, x0, noise = LinearVP().node(2.0), torch.ones(3), torch.randn(3)
        >>> x = node.alpha * x0 + node.sigma * noise
        >>> torch.allclose(derivative("sample", x0, x, node), noise)
        True
    """
    if prediction in ("epsilon", "flow_prediction"):
        return output
    if prediction == "v_prediction":
        return node.alpha * output + node.sigma * x
    if prediction == "sample":
        return (x - node.alpha * output) / node.sigma
    if prediction == "score":
        return -node.sigma * output
    raise ValueError(f"prediction={prediction!r}: choose one of {', '.join(get_args(Prediction))}.")


def guided(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float) -> Tensor:
    """Return classifier-free guidance of two predictions of shape (B, ...).

    Args:
        conditional: the prediction for the prompt.
        unconditional: the prediction without.
        scale: 1 gives the first, 0 the second, more exaggerates what the prompt changes.
        rescale: in [0, 1], how far each sample's standard deviation is moved back to that of ``conditional``.

    Examples:
        >>> guided(torch.tensor([[1.0]]), torch.tensor([[0.5]]), 3.0, 0.0)
        tensor([[2.]])

    References:
        J. Ho, T. Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv 2207.12598.
        S. Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2024, arXiv 2305.08891.
    """
    out = unconditional + scale * (conditional - unconditional)
    if rescale == 0.0:
        return out
    dims = tuple(range(1, out.dim()))
    ratio = conditional.std(dims, keepdim=True) / out.std(dims, keepdim=True)
    return out * (rescale * ratio + (1.0 - rescale))


class GuidedField:
    """``dy/drho`` of a network with classifier-free guidance.

    Args:
        denoiser: the network.
        prediction: what it predicts.
        guidance_scale: 1 for none; then the network is not evaluated without the prompt.
        guidance_rescale: in [0, 1].
        split_guidance: evaluate the two halves of guidance one after the other, and hold the activations of one of them
            at a time; costs a further evaluation in a backward pass.
        dtype: type of the network; None for that of its input.
        count: called with the number of samples at every call of the network.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prediction: str,
        *,
        guidance_scale: float,
        guidance_rescale: float,
        split_guidance: bool,
        dtype: torch.dtype | None,
        count: Callable[[int], None],
    ) -> None:
        self.denoiser, self.prediction, self.dtype, self.count = denoiser, prediction, dtype, count
        self.scale, self.rescale, self.split = guidance_scale, guidance_rescale, split_guidance

    def __call__(self, node: Node, y: Tensor, conditioning: Conditioning, unconditional: Conditioning | None) -> Tensor:
        """Return the derivative at y, shape (B, ...), in y's type."""
        x = y if node.scale == 1.0 else y * node.scale
        conditional = _expanded(conditioning, len(x), self.dtype)
        if self.scale == 1.0 or unconditional is None:
            output = self._predicted(x, node, conditional)
        else:
            output = self._guided(x, node, conditional, _expanded(unconditional, len(x), self.dtype))
        return derivative(self.prediction, output, x, node)

    def _guided(self, x: Tensor, node: Node, conditional: Conditioning, unconditional: Conditioning) -> Tensor:
        if not self.split:
            both = {name: torch.cat([unconditional[name], conditional[name]]) for name in conditional}
            without, with_ = self._predicted(torch.cat([x, x]), node, both).chunk(2)
        elif torch.is_grad_enabled():
            halves = [
                checkpoint(self._predicted, x, node, half, use_reentrant=False) for half in (unconditional, conditional)
            ]
            without, with_ = halves
        else:
            without, with_ = self._predicted(x, node, unconditional), self._predicted(x, node, conditional)
        return guided(with_, without, self.scale, self.rescale)

    def _predicted(self, x: Tensor, node: Node, conditioning: Conditioning) -> Tensor:
        self.count(len(x))  # before the call: a checkpoint that recomputes stops within it
        time = torch.full((len(x),), node.time, dtype=x.dtype, device=x.device)
        output: Tensor = self.denoiser(x if self.dtype is None else x.to(self.dtype), time, **conditioning)
        output = output.to(x.dtype)
        if output.shape == x.shape:
            return output
        if output.dim() == x.dim() and output.shape[1] == 2 * x.shape[1]:
            return output.chunk(2, dim=1)[0]  # a network with learned variances
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} for samples of shape {tuple(x.shape)}: a prediction has "
            "the shape of the samples, or twice their channels (a learned variance, which is left out)."
        )


def _expanded(conditioning: Conditioning, batch: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    expanded = {}
    for name, value in conditioning.items():
        value = value if len(value) == batch else value.expand(batch, *value.shape[1:])
        expanded[name] = value.to(dtype) if dtype is not None and value.is_floating_point() else value
    return expanded
