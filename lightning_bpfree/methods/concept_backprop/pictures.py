"""Pictures of concepts: scores by layer, scores over training, and changed inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_bpfree.methods.concept_backprop.change import ConceptChange
from lightning_bpfree.methods.concept_backprop.probe import Detection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 130


def _figure(**settings: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Pictures need matplotlib: pip install "lightning-bpfree[recipes]"') from error
    return Figure(layout="constrained", dpi=_DPI, **settings)


def detection_picture(detections: Mapping[tuple[str, str], Detection]) -> Figure:
    """Return the figure of scores by layer, a line for each concept; dashed: random labels.

    Args:
        detections: by ``(concept, layer)``.
    """
    concepts = list(dict.fromkeys(concept for concept, _ in detections))
    layers = list(dict.fromkeys(layer for _, layer in detections))
    figure = _figure(figsize=(1.5 + max(4.0, 0.9 * len(layers)), 3.4))
    axes = figure.subplots()
    for i, concept in enumerate(concepts):
        found = [detections[concept, layer] for layer in layers]
        axes.plot([d.score for d in found], "o-", color=f"C{i}", label=concept)
        axes.plot([d.control for d in found], ".--", color=f"C{i}", alpha=0.5, lw=1)
        lows, highs = [min(d.controls) for d in found], [max(d.controls) for d in found]
        axes.fill_between(range(len(layers)), lows, highs, color=f"C{i}", alpha=0.12, lw=0)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set_xticks(range(len(layers)), layers, rotation=30 if len(layers) > 4 else 0)
    axes.set_xlabel("layer")
    axes.set_ylabel("held-out score (0: chance, 1: perfect)")
    axes.set_ylim(bottom=max(-1.0, min(-0.1, axes.get_ylim()[0])), top=1.05)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("What can be read off each layer; dashed: random labels", fontsize=9)
    return figure


def emergence_picture(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the figure of scores over epochs, a panel for each concept, a line for each layer.

    Args:
        history: records ``{"epoch", "scores": {concept: {layer: {"score", "control"}}}}``.
    """
    concepts = list(history[-1]["scores"])
    layers = list(history[-1]["scores"][concepts[0]])
    figure = _figure(figsize=(3.2 * len(concepts) + 0.8, 3.0))
    panels = figure.subplots(1, len(concepts), sharey=True, squeeze=False)[0]
    epochs = [record["epoch"] for record in history]
    for axes, concept in zip(panels, concepts, strict=True):
        for i, layer in enumerate(layers):
            axes.plot(epochs, [r["scores"][concept][layer]["score"] for r in history], ".-", color=f"C{i}", label=layer)
        controls = [[r["scores"][concept][layer]["control"] for layer in layers] for r in history]
        axes.plot(epochs, [sum(c) / len(c) for c in controls], "--", color="0.5", lw=1, label="random labels")
        axes.set_title(concept, fontsize=9)
        axes.set_xlabel("epochs trained")
        axes.set_ylim(top=1.05)
    panels[0].set_ylabel("held-out score")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def change_picture(change: ConceptChange, names: Sequence[str] | None = None, most: int = 8) -> Figure:
    """Return the figure of inputs before and after, and of their difference.

    Images ``(B, C, H, W)`` become rows of pictures, vectors ``(B, D)`` bars, token ids ``(B, T)`` text.

    Args:
        change: of :func:`~lightning_bpfree.methods.concept_backprop.change.change_concept`.
        names: names of the features of vectors, or of tokens by id.
        most: samples shown.
    """
    if not change.inputs.is_floating_point():
        return _texts(change, names, most)
    if change.inputs.dim() == 4:
        return _boards(change, most) if _one_hot(change.inputs) else _images(change, most)
    return _bars(change, names)


def _images(change: ConceptChange, most: int) -> Figure:
    count = min(most, len(change.inputs))
    figure = _figure(figsize=(1.05 * count + 1.0, 3.9))
    panels = figure.subplots(3, count, squeeze=False)
    before, after = _pixels(change.reference), _pixels(change.changed)
    low, high = float(before.min()), float(before.max())
    delta = after.mean(-1) - before.mean(-1)
    reach = max(float(delta.abs().max()), 1e-9)
    for j in range(count):
        for i, pixels in enumerate((before, after)):
            shown = ((pixels[j] - low) / max(high - low, 1e-9)).clamp(0, 1)
            panels[i, j].imshow(shown.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        panels[2, j].imshow(delta[j].numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
        panels[0, j].set_title(f"{float(change.before[j]):.2f}", fontsize=8)
        panels[1, j].set_title(f"{float(change.after[j]):.2f}", fontsize=8)
        for i in range(3):
            panels[i, j].set_xticks([])
            panels[i, j].set_yticks([])
    for i, name in enumerate(("before", "after", "difference")):
        panels[i, 0].set_ylabel(name, fontsize=9)
    figure.suptitle(f"{change.concept!r} at {change.layer}; above each picture the probe's score", fontsize=9)
    return figure


def _pixels(images: Tensor) -> Tensor:
    """Return ``(B, H, W, 1 or 3)``; of other numbers of channels the mean."""
    shown = images if images.shape[1] in (1, 3) else images.mean(1, keepdim=True)
    return shown.float().movedim(1, -1)


def _boards(change: ConceptChange, most: int) -> Figure:
    """Squares with a sign for every category, those that have changed in red."""
    count, signs = min(most, len(change.inputs)), "·×○△□◇+*#@" + "?" * change.inputs.shape[1]
    height, width = change.inputs.shape[2:]
    figure = _figure(figsize=(1.15 * count + 0.8, 2.9))
    panels = figure.subplots(2, count, squeeze=False)
    boards = change.inputs.argmax(1), change.changed.argmax(1)
    for j in range(count):
        for i, (board, score) in enumerate(zip(boards, (change.before[j], change.after[j]), strict=True)):
            axes = panels[i, j]
            axes.set_xlim(-0.5, width - 0.5)
            axes.set_ylim(height - 0.5, -0.5)
            axes.set_aspect("equal")
            axes.set_xticks([x + 0.5 for x in range(width - 1)], [])
            axes.set_yticks([y + 0.5 for y in range(height - 1)], [])
            axes.tick_params(length=0)
            axes.grid(color="0.8")
            axes.set_title(f"{float(score):.2f}", fontsize=8)
            for y in range(height):
                for x in range(width):
                    new = i == 1 and bool(boards[0][j, y, x] != boards[1][j, y, x])
                    sign, color = signs[int(board[j, y, x])], "tab:red" if new else "0.15"
                    axes.text(x, y, sign, ha="center", va="center", fontsize=13, color=color)
    panels[0, 0].set_ylabel("before", fontsize=9)
    panels[1, 0].set_ylabel("after", fontsize=9)
    figure.suptitle(f"{change.concept!r} at {change.layer}; above each board the probe's score", fontsize=9)
    return figure


def _one_hot(images: Tensor) -> bool:
    return images.shape[1] > 1 and bool(((images == 0) | (images == 1)).all()) and bool((images.sum(1) == 1).all())


def _bars(change: ConceptChange, names: Sequence[str] | None) -> Figure:
    delta = change.delta.flatten(1)
    labels = list(names) if names is not None else [str(i) for i in range(delta.shape[1])]
    if len(labels) != delta.shape[1]:
        raise ValueError(f"names: {len(labels)} for {delta.shape[1]} features.")
    order = delta.abs().mean(0).argsort(descending=True)[:20]
    figure = _figure(figsize=(6.0, 0.8 + 0.26 * len(order)))
    axes = figure.subplots()
    for place, feature in enumerate(order.tolist()):
        values = delta[:, feature]
        axes.barh(place, float(values.mean()), color="tab:red" if values.mean() > 0 else "tab:blue", alpha=0.6)
        axes.plot(values.numpy(), torch.full((len(values),), float(place)).numpy(), ".", color="0.2", ms=2, alpha=0.5)
    axes.set_yticks(range(len(order)), [labels[i] for i in order.tolist()], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", lw=0.8)
    axes.set_xlabel("change of the input; bars: mean, dots: samples")
    means = float(change.before.mean()), float(change.after.mean())
    axes.set_title(f"{change.concept!r} at {change.layer}: score {means[0]:.2f} -> {means[1]:.2f}", fontsize=9)
    return figure


def _texts(change: ConceptChange, names: Sequence[str] | None, most: int) -> Figure:
    count = min(most, len(change.inputs))
    length = change.inputs.shape[1]
    figure = _figure(figsize=(max(5.0, 0.105 * length + 1.6), 0.5 * count + 0.5))
    axes = figure.subplots()
    axes.set_xlim(0, length + 8)
    axes.set_ylim(2.4 * count, -0.6)
    axes.axis("off")
    for j in range(count):
        rows = (change.inputs[j].tolist(), change.changed[j].tolist())
        for i, (ids, score) in enumerate(zip(rows, (change.before[j], change.after[j]), strict=True)):
            height = 2.4 * j + 0.9 * i
            for place, token in enumerate(ids):
                new = i == 1 and token != rows[0][place]
                style: dict[str, Any] = {"color": "tab:red", "weight": "bold"} if new else {"color": "0.15"}
                text = _shown(token, names)
                axes.text(
                    place,
                    height,
                    text,
                    family="monospace",
                    fontsize=8,
                    va="center",
                    ha="center",
                    parse_math=False,
                    **style,
                )
            axes.text(length + 2, height, f"{float(score):.2f}", fontsize=8, va="center")
    axes.set_title(
        f"{change.concept!r} at {change.layer}: before, after, and the probe's score", fontsize=9, loc="left"
    )
    return figure


def _shown(token: int, names: Sequence[str] | None) -> str:
    if names is not None:
        return names[token]
    return chr(token) if 32 < token < 127 else "␣" if token == 32 else "↵" if token == 10 else "·"
