"""Evaluation of a team by its means and by its draws, independent of which one its network returns."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_bpfree.core.labels import LabelsOf, labels_of
from lightning_bpfree.methods.team_reinforce.network import TeamNetwork
from lightning_bpfree.methods.team_reinforce.rewards import chance_of_labels
from lightning_bpfree.methods.team_reinforce.units.stochastic import Softmax


class EvaluationReport:
    """Logs accuracy and expected reward of validation and test batches, by means and averaged over draws.

    Args:
        labels: takes the labels out of a batch that is not a pair.
    """

    def __init__(self, labels: LabelsOf | None) -> None:
        self.labels = labels
        self._team: TeamNetwork | None = None
        self._given: Tensor | None = None  # the labels that the network was called with
        self._stage = ""

    def begin(self, trainer: pl.Trainer, team: TeamNetwork, wanted: bool) -> None:
        """Begin to note what the network returns in both ways, if rewards are for classes."""
        stage = trainer.state.stage
        self._stage = "" if stage is None else {"validate": "val", "test": "test"}.get(stage.value, "")
        wanted = wanted and not trainer.barebones and not trainer.sanity_checking
        self._team = team if wanted and self._stage and isinstance(team.output, Softmax) else None
        team.noted = {} if self._team is not None else None

    def end(self) -> None:
        """Note no more."""
        if self._team is not None:
            self._team.noted, self._team = None, None

    def log(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Log the batch that was just evaluated, if it has labels."""
        team = self._team
        if team is None or team.noted is None:
            return
        noted, team.noted = team.noted, {}
        for way, scores in noted.items():
            self._given = team.noted_labels
            labels = self._labels(batch, scores)
            if labels is None:
                continue
            assert team.output is not None
            chance = chance_of_labels(scores, labels, team.output.temperature)
            values = {
                f"bpfree/team_reinforce/{self._stage}_acc_{way}": (scores.argmax(-1) == labels).float().mean(),
                f"bpfree/team_reinforce/{self._stage}_reward_{way}": 2 * chance.mean() - 1,
            }
            module.log_dict(values, on_epoch=True, batch_size=len(labels), sync_dist=trainer.world_size > 1)

    def _labels(self, batch: Any, scores: Tensor) -> Tensor | None:
        if scores.dim() != 2:
            return None
        try:
            return labels_of(batch, len(scores), scores.shape[1], self.labels, self._given)
        except ValueError:  # a validation batch may have another form; its metrics are the user's own then
            return None
