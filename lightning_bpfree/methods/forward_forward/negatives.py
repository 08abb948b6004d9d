"""Labels written into inputs, and negative inputs (Forward-Forward)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bpfree.core.network.network_call import RefusedError


def overlaid(inputs: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """Return copies of ``inputs`` whose first ``num_classes`` values encode the label.

    The value at the label's place becomes the sample's largest, those at the other places its smallest: the label is
    written on the scale of the data, whatever its normalization, and a sample's copy does not depend on its batch.

    Args:
        inputs: vectors ``(B, D)``, or images ``(B, C, H, W)``, of which each channel is written to, row by row.
        labels: shape ``(B,)``, or None for a neutral label: every place gets ``1 / num_classes`` of the way up.
        num_classes: how many places.

    Raises:
        ValueError: for other shapes, and if a sample has fewer than ``num_classes + 1`` places.

    Examples:
        >>> overlaid(torch.tensor([[5.0, 5.0, 2.0, 1.0]]), torch.tensor([1]), num_classes=2)
        tensor([[1., 5., 2., 1.]])
    """
    if inputs.dim() not in (2, 4) or not inputs.is_floating_point():
        raise RefusedError(
            f"label='overlay': the network's input is {inputs.dtype} of shape {tuple(inputs.shape)}; a label can be "
            "written into vectors (B, D) and images (B, C, H, W) of floating-point numbers. Use label='embedding', or "
            "a function (inputs, labels) -> inputs."
        )
    shape = inputs.shape
    places = inputs.reshape(shape[0], 1 if inputs.dim() == 2 else shape[1], -1)
    if places.shape[2] <= num_classes:
        raise RefusedError(
            f"label='overlay': {num_classes} labels do not fit into inputs of {places.shape[2]} values (shape "
            f"{tuple(shape)}), since a label must not fill the whole input. Use label='embedding', or larger inputs."
        )
    flat = places.flatten(1)
    low, high = (end.view(-1, 1, 1) for end in (flat.amin(1), flat.amax(1)))
    made = places.clone()
    if labels is None:
        made[:, :, :num_classes] = low + (high - low) / num_classes
    else:
        marks = F.one_hot(labels, num_classes).bool().unsqueeze(1)
        made[:, :, :num_classes] = torch.where(marks, high, low)
    return made.reshape(shape)


def wrong_labels(labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return labels drawn uniformly among those that are not the sample's own.

    Args:
        labels: the true ones, shape ``(B,)``.
        num_classes: at least 2.
        generator: on the CPU.

    Examples:
        >>> wrong_labels(torch.tensor([0, 1]), num_classes=2, generator=torch.Generator())
        tensor([1, 0])
    """
    away = torch.randint(1, num_classes, labels.shape, generator=generator)
    return (labels + away.to(labels.device)) % num_classes


def hard_labels(scores: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return wrong labels drawn by the softmax of ``scores``: those that the model finds likely.

    Args:
        scores: shape ``(B, num_classes)``.
        labels: the true ones, shape ``(B,)``; they are never drawn.
        generator: on the CPU.

    Examples:
        >>> hard_labels(torch.tensor([[0.0, 99.0, 0.0]]), torch.tensor([2]), torch.Generator())
        tensor([1])
    """
    scores = scores.detach().float().scatter(1, labels[:, None], -torch.inf)
    drawn = torch.multinomial(torch.softmax(scores, 1).cpu(), 1, generator=generator)
    return drawn[:, 0].to(labels.device)


def hybrid_images(inputs: Tensor, generator: torch.Generator, blurs: int = 6) -> Tensor:
    """Return images made of parts of two: right at close range, wrong as a whole.

    A random bit image is blurred and thresholded at one half; where the mask is 1 the sample stays, elsewhere it is
    replaced by another sample of the batch.

    Args:
        inputs: images, shape ``(B, C, H, W)``, ``B`` at least 2.
        generator: on the CPU.
        blurs: how often [1/4, 1/2, 1/4] goes over the bits, in both directions: more make larger parts.

    Raises:
        ValueError: for other shapes, and for a single sample.

    Examples:
        >>> hybrid_images(torch.rand(4, 1, 8, 8), torch.Generator()).shape
        torch.Size([4, 1, 8, 8])
    """
    if inputs.dim() != 4 or len(inputs) < 2:
        raise RefusedError(
            f"negatives='hybrid': the network's input has the shape {tuple(inputs.shape)}; hybrids are made of at "
            "least two images (B, C, H, W). Pass a function as negatives for other inputs."
        )
    rows, _, height, width = inputs.shape
    mask = torch.randint(0, 2, (rows, 1, height, width), generator=generator).float()
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).view(1, 1, 3, 3)
    for _ in range(blurs):
        mask = F.conv2d(F.pad(mask, (1, 1, 1, 1), mode="reflect" if min(height, width) > 1 else "replicate"), kernel)
    mask = (mask > 0.5).to(inputs.device)
    away = int(torch.randint(1, rows, (), generator=generator))  # a shift: no sample meets itself
    return torch.where(mask, inputs, inputs.roll(away, 0))
