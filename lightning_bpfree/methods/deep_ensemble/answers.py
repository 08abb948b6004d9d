"""An ensemble in evaluation: it replaces the network's output, logs member metrics, and fits stacking weights."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bpfree.methods.deep_ensemble.combining.combination import Combination
from lightning_bpfree.methods.deep_ensemble.combining.evaluation import Evaluation
from lightning_bpfree.methods.deep_ensemble.combining.network import EnsembleNetwork
from lightning_bpfree.methods.deep_ensemble.combining.report import Report
from lightning_bpfree.methods.deep_ensemble.combining.stacking import cross_fitted, stacking_weights
from lightning_bpfree.methods.deep_ensemble.run import EnsembleRun
from lightning_bpfree.methods.deep_ensemble.settings import Settings

_FOLDS = 5
_STEPS = {"val": "validation_step", "test": "test_step", "predict": "predict_step"}


class Answers:
    """What one ensemble says while a Trainer validates, tests or predicts.

    Args:
        run: the ensemble.
        combination: of its members' outputs.
        settings: settings of the ensemble.

    Raises:
        MisconfigurationException: if the settings name a network that the module does not have.
    """

    def __init__(self, run: EnsembleRun, combination: Combination, settings: Settings) -> None:
        self.run, self.combination, self.settings = run, combination, settings
        self._members = run.members
        self.evaluation = Evaluation(run.members, combination, run.at_work, run.side_by_side)
        self.network = EnsembleNetwork(run.module, self.evaluation, settings.network)
        self._stage = ""
        self._report: Report | None = None
        self._weights: Any = None  # those before the evaluation

    def speaks_for(self, run: EnsembleRun) -> bool:
        """Whether this is the ensemble with its current members."""
        return self.run is run and self._members is run.members

    def begin(self, stage: str) -> None:
        """Begin to answer.

        Args:
            stage: ``val``, ``test`` or ``predict``.

        Raises:
            MisconfigurationException: if the weights of stacking are wanted and not fitted.
        """
        stacking = self.settings.combine == "stack"
        if stacking and stage != "val" and self.combination.weights is None:
            raise MisconfigurationException(
                "DeepEnsemble(combine='stack') has not fitted its weights: fit with validation data, or call "
                "trainer.validate first."
            )
        self._stage, self._weights = stage, self.combination.weights
        self._report = None if stage == "predict" else Report(self.combination, self.settings.targets, keep=stacking)
        if stacking and stage == "val":
            self.combination.weights = None  # weights that these data have decided would flatter them
        self.network.install()

    def begin_batch(self) -> None:
        """Begin another step."""
        self.network.begin()

    def end_batch(self, batch: Any, loader: int) -> str | None:
        """Count what the members said in a step; returns the name of the network that the step called."""
        self.network.check_called(_STEPS[self._stage])
        evaluation = self.evaluation
        if self._report is not None and self.network.calls == 1 and evaluation.predictions is not None:
            assert evaluation.combined is not None
            self._report.update(batch, evaluation.predictions, evaluation.combined, loader)
        return self.network.found

    def report(self, sanity_checking: bool) -> dict[str, Tensor]:
        """Return what to log of the evaluation; after a validation, fit the weights of stacking."""
        if self._report is None:
            return {}
        values = self._report.compute(self._stage)
        if self.settings.combine == "stack" and self._stage == "val":
            self.combination.weights = self._weights
            if not sanity_checking:
                values |= self._fit_weights(self._report)
        return values

    def _fit_weights(self, report: Report) -> dict[str, Tensor]:
        kept = report.everything()
        if kept is None:
            raise MisconfigurationException(
                "DeepEnsemble(combine='stack') found no targets in the validation batches to fit its weights to: say "
                "where they are, targets='labels' or targets=lambda batch: batch[1]."
            )
        predictions, targets = kept
        regression = self.settings.task == "regression"
        self.combination.weights = stacking_weights(predictions, targets, regression=regression).tolist()
        held_out = cross_fitted(predictions, targets, min(_FOLDS, len(targets)), regression=regression)
        if regression:
            return {"val/stack/MSE": ((held_out - targets) ** 2).mean()}
        return {
            "val/stack/Acc": (held_out.argmax(-1) == targets).float().mean(),
            "val/stack/NLL": nn.functional.nll_loss(held_out.log(), targets),
        }

    def end(self) -> None:
        """Restore the module's own computation."""
        self.network.remove()
        self._report = None
