"""Conversion of the outputs of the members' networks to that of the ensemble, in the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_bpfree.methods.deep_ensemble.combining.aggregation import (
    mean_and_variance,
    mean_probability,
    vote_probabilities,
)

Combine = Literal["mean", "vote", "stack"]
Task = Literal["classification", "binary", "regression"]


class Combination:
    """Combines the outputs of members into one of the same form, so that code after the network needs no changes.

    Logits become the logarithm of the combined probabilities: softmax, cross-entropy and argmax of it are those of the
    ensemble. Of a network that returns several tensors, the prediction is the entry ``"logits"`` of a mapping, or the
    first of a tuple; of the others, such as a loss, members' means are taken, or the first member's where they are no
    floating-point numbers.

    Args:
        combine: ``"mean"``, ``"vote"`` or ``"stack"`` (the mean, with weights that are fitted).
        task: what the prediction is: logits of classes, one logit a sample, or values.
        weights: weights of the members; None for equal weights.
        probabilities: whether the network returns probabilities rather than logits.
        class_dim: dimension of a prediction that counts classes.
    """

    def __init__(
        self,
        combine: Combine = "mean",
        task: Task = "classification",
        weights: Sequence[float] | None = None,
        *,
        probabilities: bool = False,
        class_dim: int | None = None,
    ) -> None:
        self.combine, self.task, self.weights = combine, task, weights
        self.probabilities, self.class_dim = probabilities, class_dim

    def combined(self, outputs: Sequence[Any]) -> Any:
        """Return the ensemble's output.

        Args:
            outputs: outputs of the members' networks.

        Raises:
            ValueError: where they differ in shape, or are none of the task.
        """
        flat = [tree_flatten(output) for output in outputs]
        leaves = []
        prediction = self.place(outputs[0])
        for place, values in enumerate(zip(*(own for own, _ in flat), strict=True)):
            if not isinstance(values[0], Tensor):
                leaves.append(values[0])
                continue
            shapes = [tuple(value.shape) for value in values]
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"the members' outputs differ in shape ({', '.join(map(str, dict.fromkeys(shapes)))}): an ensemble "
                    "needs members that predict the same."
                )
            if place == prediction:
                leaves.append(self.of_predictions(torch.stack(values)))
            elif values[0].is_floating_point():
                leaves.append(torch.stack(values).mean(0))
            else:
                leaves.append(values[0])
        return tree_unflatten(leaves, flat[0][1])

    def place(self, output: Any) -> int:
        """Return which of an output's leaves is the prediction."""
        leaves, _ = tree_flatten(output)
        wanted = leaves[0] if leaves else None
        if isinstance(output, Mapping):
            wanted = next((output[key] for key in ("logits", "prediction", "predictions") if key in output), wanted)
        for place, leaf in enumerate(leaves):
            if leaf is wanted and isinstance(leaf, Tensor):
                return place
        raise ValueError(
            f"the network returns {type(output).__name__}, in which DeepEnsemble finds no prediction: return a tensor, "
            "a tuple that begins with it, or a mapping with the key 'logits'."
        )

    def of_predictions(self, predictions: Tensor) -> Tensor:
        """Return the combination of predictions ``(M, B, ...)``, of the form of one member's ``(B, ...)``."""
        if self.task == "regression":
            return mean_and_variance(predictions, weights=self.weights)[0]
        members = self.member_probabilities(predictions)
        combine = vote_probabilities if self.combine == "vote" else mean_probability
        combined = combine(members, self.weights)
        if self.task == "binary":
            shape = predictions.shape[1:]
            positive, negative = combined[..., 1].reshape(shape), combined[..., 0].reshape(shape)
            result = positive if self.probabilities else positive.log() - negative.log()
        else:
            result = (combined if self.probabilities else combined.log()).movedim(-1, self._class_dim(predictions[0]))
        return result.to(predictions.dtype)

    def member_probabilities(self, predictions: Tensor) -> Tensor:
        """Return the members' probabilities ``(M, B, ..., C)``, classes last, in at least single precision.

        Raises:
            ValueError: for predictions that are none of the task.
        """
        wide = predictions.float() if predictions.dtype in (torch.float16, torch.bfloat16) else predictions
        tiny = torch.finfo(wide.dtype).tiny  # keeps logarithms of what rounds to zero finite
        if self.task == "binary":
            if wide.dim() > 2:
                self._check_single(wide)
                wide = wide.squeeze(-1)
            both = [1 - wide, wide] if self.probabilities else [torch.sigmoid(-wide), torch.sigmoid(wide)]
            return torch.stack(both, -1).clamp_min(tiny)
        dim = self._class_dim(wide[0])
        last = wide.movedim(dim + 1 if dim >= 0 else dim, -1)
        if last.shape[-1] < 2:
            raise ValueError(
                f"task='classification' needs logits of at least 2 classes, and the network returns shape "
                f"{tuple(predictions.shape[1:])}: use task='binary' for one logit a sample, or task='regression'."
            )
        return (last if self.probabilities else last.softmax(-1)).clamp_min(tiny)

    def _check_single(self, wide: Tensor) -> None:
        if wide.shape[-1] != 1:
            raise ValueError(
                f"task='binary' needs one logit a sample, (B,) or (B, 1), and the network returns "
                f"{tuple(wide.shape[1:])}: use task='classification'."
            )

    def _class_dim(self, prediction: Tensor) -> int:
        if self.class_dim is not None:
            return self.class_dim
        if prediction.dim() != 2:
            raise ValueError(
                f"the network returns shape {tuple(prediction.shape)}, in which DeepEnsemble cannot tell the dimension "
                "of the classes: give class_dim=1 for (B, C, ...), class_dim=-1 for (B, ..., C), or the task."
            )
        return -1
