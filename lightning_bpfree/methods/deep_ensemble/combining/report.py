"""Metrics of an ensemble in evaluation, in addition to the user's: members, their disagreement, calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from lightning_bpfree.methods.deep_ensemble.combining.aggregation import disagreement, entropy, mutual_information
from lightning_bpfree.methods.deep_ensemble.combining.combination import Combination

TargetsOf = str | Callable[[Any], Tensor] | None
_KEYS = ("labels", "label", "targets", "target", "y")

# What an ensemble logs in evaluations, with its meaning.
LOGGED = {
    "<stage>/cls/Acc": "accuracy of the ensemble in an evaluation",
    "<stage>/cls/NLL": "negative log-likelihood of the ensemble",
    "<stage>/cls/Brier": "Brier score of the ensemble",
    "<stage>/cal/ECE": "expected calibration error of the ensemble, 15 bins",
    "<stage>/reg/<name>": "MSE and MAE of the ensemble (regression)",
    "<stage>/ens_<name>": "spread of the members: Disagreement, Entropy and MI, or Variance (regression)",
    "<stage>/member_<index>/<name>": "the same scores for each member",
}


def targets_of(batch: Any, pick: TargetsOf) -> Tensor | None:
    """Return the targets of a batch, or None if it has none that can be recognized.

    Args:
        batch: what the data loader gives: a pair (inputs, targets), or a mapping.
        pick: key of a mapping, or a function of the batch; None looks for the usual places.
    """
    if callable(pick):
        return pick(batch)
    if isinstance(batch, Mapping):
        for key in (pick,) if pick is not None else _KEYS:
            if isinstance(batch.get(key), Tensor):
                found: Tensor = batch[key]
                return found
    if pick is None and isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


class ClassificationReport(nn.Module):
    """Accuracy, negative log-likelihood, Brier score and calibration error of the ensemble and of each member.

    Args:
        members: how many.
        classes: how many.
    """

    def __init__(self, members: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.scores: Any = nn.ModuleList(_scores(classes) for _ in range(members + 1))
        self.spread: Any = nn.ModuleDict({name: MeanMetric() for name in ("Disagreement", "Entropy", "MI")})

    def update(self, members: Tensor, combined: Tensor, targets: Tensor | None) -> None:
        """Count a batch.

        Args:
            members: probabilities ``(M, N, C)``.
            combined: probabilities ``(N, C)``.
            targets: int64 ``(N,)``; None counts what needs none.
        """
        self.spread["Disagreement"].update(disagreement(members))
        self.spread["Entropy"].update(entropy(members).mean(0))
        self.spread["MI"].update(mutual_information(members))
        if targets is None:
            return
        for scores, probabilities in zip(self.scores, [*members, combined], strict=True):
            _count(scores, probabilities, targets)

    def compute(self) -> dict[str, Tensor]:
        """Return everything counted, by the names of torch-uncertainty."""
        values = {f"ens_{name}": metric.compute() for name, metric in self.spread.items()}
        if not self.scores[0]["Acc"].update_called:
            return values
        *members, ensemble = [{name: metric.compute() for name, metric in s.items()} for s in self.scores]
        values |= {f"{'cal' if name == 'ECE' else 'cls'}/{name}": value for name, value in ensemble.items()}
        return values | {f"member_{m}/{name}": v for m, own in enumerate(members) for name, v in own.items()}


def _scores(classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "Acc": MulticlassAccuracy(classes, average="micro", validate_args=False),
            "NLL": MeanMetric(),
            "Brier": MeanMetric(),
            "ECE": MulticlassCalibrationError(classes, n_bins=15, validate_args=False),
        }
    )


def _count(scores: Any, probabilities: Tensor, targets: Tensor) -> None:
    likelihood = probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    truth = nn.functional.one_hot(targets, probabilities.shape[-1])
    scores["Acc"].update(probabilities, targets)
    scores["ECE"].update(probabilities, targets)
    scores["NLL"].update(-likelihood.log())
    scores["Brier"].update(((probabilities - truth) ** 2).sum(-1))


class RegressionReport(nn.Module):
    """Squared and absolute error of the ensemble and of each member, and the variance between members.

    Args:
        members: how many.
    """

    def __init__(self, members: int) -> None:
        super().__init__()
        self.scores: Any = nn.ModuleList(
            MetricCollection({"MSE": MeanSquaredError(), "MAE": MeanAbsoluteError()}, compute_groups=False)
            for _ in range(members + 1)
        )
        self.variance = MeanMetric()

    def update(self, members: Tensor, combined: Tensor, targets: Tensor | None) -> None:
        """Count a batch: values ``(M, ...)``, ``(...)`` and ``(...)``."""
        self.variance.update(members.var(0, correction=0))
        if targets is None:
            return
        for scores, values in zip(self.scores, [*members, combined], strict=True):
            scores.update(values.contiguous(), targets.contiguous())

    def compute(self) -> dict[str, Tensor]:
        """Return everything counted."""
        values = {"ens_Variance": self.variance.compute()}
        if not self.scores[0]["MSE"].update_called:
            return values
        *members, ensemble = [scores.compute() for scores in self.scores]
        values |= {f"reg/{name}": value for name, value in ensemble.items()}
        return values | {f"member_{m}/{name}": v for m, own in enumerate(members) for name, v in own.items()}


class Report:
    """Collects the reports of one evaluation, one for each data loader.

    Args:
        combination: knows what predictions are.
        targets: how to find targets in a batch.
        keep: whether to keep all predictions and targets, for stacking.
    """

    def __init__(self, combination: Combination, targets: TargetsOf, keep: bool) -> None:
        self.combination, self.targets, self.keep = combination, targets, keep
        self.parts: dict[int, ClassificationReport | RegressionReport] = {}
        self.kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, batch: Any, predictions: Tensor, combined: Tensor, loader: int) -> None:
        """Count one batch: the members' predictions ``(M, B, ...)``, and the ensemble's."""
        targets = targets_of(batch, self.targets)
        if self.combination.task == "regression":
            members, one = predictions.float(), combined.float()
            if targets is not None:
                targets = targets.to(one.dtype).reshape(one.shape) if targets.numel() == one.numel() else None
        else:
            members = self.combination.member_probabilities(predictions).flatten(1, -2)
            one = self.combination.member_probabilities(combined.unsqueeze(0))[0].flatten(0, -2)
            targets = _labels(targets, one)
            if targets is not None and bool((targets < 0).any()):  # as cross-entropy ignores -100
                counted = targets >= 0
                members, one, targets = members[:, counted], one[counted], targets[counted]
        if loader not in self.parts:
            count, classes = len(members), one.shape[-1]
            made = RegressionReport(count) if self.combination.task == "regression" else None
            self.parts[loader] = (made or ClassificationReport(count, classes)).to(predictions.device)
        self.parts[loader].update(members, one, targets)
        if self.keep and targets is not None and loader == 0:
            self.kept.append((members, targets))

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return what to log: ``val/cls/Acc`` and the like; of several loaders, each with its number behind."""
        several = len(self.parts) > 1
        return {
            f"{stage}/{name}" + (f"/dataloader_idx_{loader}" if several else ""): value
            for loader, part in self.parts.items()
            for name, value in part.compute().items()
        }

    def everything(self) -> tuple[Tensor, Tensor] | None:
        """Return all members' predictions ``(M, N, ...)`` and targets ``(N, ...)`` kept, of the first loader."""
        if not self.kept:
            return None
        predictions, targets = zip(*self.kept, strict=True)
        return torch.cat(predictions, 1), torch.cat(targets)


def _labels(targets: Tensor | None, probabilities: Tensor) -> Tensor | None:
    """Return targets as int64 ``(N,)``, or None where they are no labels of these predictions."""
    if targets is None or targets.numel() != len(probabilities):
        return None
    labels = targets.reshape(-1).to(torch.int64)
    return labels if int(labels.max()) < probabilities.shape[-1] else None
