"""Deep ensembles: several members of any LightningModule, trained in one run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_bpfree.core.arguments import Fraction, Name, NonEmpty, PositiveFloat, PositiveInt, checked
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.methods.deep_ensemble.answers import Answers
from lightning_bpfree.methods.deep_ensemble.bootstrap import Bootstrap
from lightning_bpfree.methods.deep_ensemble.checks import check_fit, check_strategy
from lightning_bpfree.methods.deep_ensemble.combining.combination import Combination, Combine, Task
from lightning_bpfree.methods.deep_ensemble.combining.exported import EnsembleModule
from lightning_bpfree.methods.deep_ensemble.combining.report import LOGGED, TargetsOf
from lightning_bpfree.methods.deep_ensemble.initialization import Initialize, initial_states
from lightning_bpfree.methods.deep_ensemble.optimizers import MemberOptimizers
from lightning_bpfree.methods.deep_ensemble.run import EnsembleRun
from lightning_bpfree.methods.deep_ensemble.settings import Route, Settings
from lightning_bpfree.training.training_rule import TrainingRule


class DeepEnsemble(Callback):
    """Trains several members of any LightningModule in one run, and evaluates their combination.

    Each member has its own parameters, buffers, random streams and optimizer state, and is equal to a member trained
    alone with its seed. In training, ``self.log`` logs the mean over members. In validation, test and prediction, the
    user's step runs once, and the network that it calls returns the ensemble's output: the user's own metrics are those
    of the ensemble. The callback also logs, under the names of torch-uncertainty, ``val/cls/Acc``, ``val/cls/NLL``,
    ``val/cls/Brier``, ``val/cal/ECE``, ``val/ens_Disagreement``, ``val/ens_Entropy``, ``val/ens_MI`` (regression:
    ``val/reg/MSE``, ``val/reg/MAE``, ``val/ens_Variance``), and ``val/member_0/Acc`` and so on.

    After the fit, the module itself has the weights of the first member; :meth:`export` returns the ensemble.

    Args:
        members: number of members, >= 1; None for 5, or the number of activations if given.
        activations: names of activations that replace the module's own: adjacent members share one, and the number of
            members must be a multiple of theirs. Of ``relu``, ``relu6``, ``elu``, ``selu``, ``celu``, ``gelu``,
            ``silu``, ``mish``, ``tanh``, ``leaky_relu``, ``softplus``, ``hardswish``.
        combine: ``"mean"`` of the probabilities or values; ``"vote"``: the class with the most votes, a tie going to
            the larger mean probability; ``"stack"``: the mean with weights fitted to the validation data.
        task: what the network returns: ``"classification"``: logits of two or more classes; ``"binary"``: one logit
            per sample; ``"regression"``: values.
        weights: weights of the members in mean or vote, each >= 0, summing to 1; None for equal weights.
        bootstrap: whether each member trains on its own sample of the training set, drawn with replacement.
        lr_factors: factors on the configured learning rates, one per member, each > 0; None for 1.
        initialize: how members after the first get other weights; the first starts from the module's weights.
            ``"reset"``: by ``reset_parameters()`` of the module or of its parts (pretrained weights are lost, frozen
            ones kept); ``"same"``: no change; or a function that initializes the given module in place.
        seed: seed of the members' seeds, or a list of these; None uses torch's initial seed (``seed_everything``).
        route: ``"stacked"``: all members in one vmapped step; ``"sequential"``: one after another; ``"auto"`` chooses,
            and reports the choice and the reason.
        network: name of the submodule that is the network (``"net"``; ``""`` for the module itself); None finds the
            submodule that evaluation steps call.
        probabilities: whether the network returns probabilities rather than logits.
        class_dim: class dimension of a prediction; None for the last of two.
        targets: key of the targets in a batch that is a mapping, or a function that extracts them from a batch; None
            for the second of a pair, or ``batch["labels"]`` and the like.

    Raises:
        ValueError: for arguments out of range.
        MisconfigurationException: before the first batch, for a module that does not support ensembles, with the
            reason.

    Examples:
        >>> ensemble = DeepEnsemble(activations=["relu", "elu", "gelu"])
        >>> ensemble.settings.members
        3

    References:
        B. Lakshminarayanan, A. Pritzel, C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep
        Ensembles", 2017, arXiv 1612.01474.
        G. A. Mendrofa, G. F. Hertono, B. D. Handari, "Ensemble Learning Model on Artificial Neural
        Network-Backpropagation (ANN-BP) Architecture for Coal Pillar Stability Classification", 2023, arXiv 2303.16524.
    """

    logged: ClassVar[dict[str, str]] = LOGGED

    @checked
    def __init__(
        self,
        members: PositiveInt | None = None,
        *,
        activations: Annotated[Sequence[Name], NonEmpty()] | None = None,
        combine: Combine = "mean",
        task: Task = "classification",
        weights: Annotated[Sequence[Fraction], NonEmpty()] | None = None,
        bootstrap: bool = False,
        lr_factors: Annotated[Sequence[PositiveFloat], NonEmpty()] | None = None,
        initialize: Initialize = "reset",
        seed: int | Annotated[Sequence[int], NonEmpty()] | None = None,
        route: Route = "auto",
        network: str | None = None,
        probabilities: bool = False,
        class_dim: int | None = None,
        targets: TargetsOf = None,
    ) -> None:
        count = (len(activations) if activations else 5) if members is None else members
        self.settings = Settings(
            members=count,
            activations=activations,
            combine=combine,
            task=task,
            weights=weights,
            bootstrap=bootstrap,
            lr_factors=lr_factors or (),
            initialize=initialize,
            seed=seed,
            route=route,
            network=network,
            probabilities=probabilities,
            class_dim=class_dim,
            targets=targets,
        )
        self.combination = Combination(combine, task, weights, probabilities=probabilities, class_dim=class_dim)
        self._run: EnsembleRun | None = None
        self._answers: Answers | None = None
        self._bootstrap: Bootstrap | None = None
        self._loaded: dict[str, Any] | None = None
        self._global: dict[str, Any] | None = None  # random streams of a checkpoint
        self._network_name: str | None = network

    # --- what a run has made ---

    @property
    def seeds(self) -> list[int]:
        """The members' seeds; empty before the first fit."""
        return [] if self._run is None else list(self._run.seeds)

    @property
    def route(self) -> str:
        """One line that describes how the members are trained; empty before the first fit."""
        return "" if self._run is None else self._run.route()

    @property
    def rule_copies(self) -> list[TrainingRule]:
        """The training rules of all members except the first (which has the Trainer's) in the last fit."""
        rules = None if self._run is None else self._run.rules
        return [] if rules is None else list(rules.copies)

    def member_states(self) -> list[dict[str, Tensor]]:
        """Return copies of all members' parameters (tied ones once) and buffers, by name.

        Raises:
            RuntimeError: before the first fit.
        """
        run = self._running()
        return [run.members.state(m) for m in range(run.members.count)]

    def export(self) -> EnsembleModule:
        """Return the ensemble as a plain module with ``members``; calling it returns their combination.

        The members are copies of the network that evaluation steps call, or of the whole LightningModule if there was
        no evaluation yet. They are on the CPU and in evaluation mode.

        Raises:
            RuntimeError: before the first fit.
        """
        run = self._running()
        name = self._network_name or ""
        copies = []
        for member in range(run.members.count):
            with run.members.at_work(member):
                part = _detached_copy(run.module, name)
            run.activations.put_into(part, member, name)
            copies.append(part.cpu().eval())
        return EnsembleModule(copies, copy.deepcopy(self.combination))

    def _running(self) -> EnsembleRun:
        if self._run is None:
            raise RuntimeError("DeepEnsemble has no members yet: fit a Trainer with it, or give it a checkpoint.")
        return self._run

    # --- one fit ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse unsupported settings and modules before training."""
        check_strategy(trainer)
        if stage == "fit":
            check_fit(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the members and their optimizers, or restore those of a checkpoint or of the last fit."""
        loaded = self._loaded
        if loaded is None:
            run = self._run if self._run is not None and self._run.module is pl_module else None
            seeds = self.settings.seeds(torch.initial_seed()) if run is None else run.seeds
            states = initial_states(pl_module, seeds, self.settings.initialize) if run is None else self.member_states()
            streams = None if run is None else run.streams.to_plain()
            resumed = None
        else:
            seeds, states, streams, resumed = loaded["seeds"], loaded["members"], loaded["streams"], loaded["route"]
        self._run = EnsembleRun(pl_module, states, seeds, self.settings)
        if streams is not None:
            self._run.streams.from_plain(streams)
        self._run.start(trainer, self, resumed)
        if self.settings.bootstrap:
            self._bootstrap = Bootstrap(trainer, pl_module, seeds)
        if loaded is not None:
            self._global = loaded["global"]
            self._continue_stream(pl_module)  # before the data loaders draw their order
        self._answers = Answers(self._run, self.combination, self.settings)
        for logger in trainer.loggers:
            logger.log_hyperparams({"bpfree_ensemble": self.settings.plain()})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give each member its own training rule, after all callbacks have started."""
        loaded, self._loaded = self._loaded, None
        self._running().copy_rules(trainer, None if loaded is None else loaded["rules"])
        if loaded is not None:
            rank_zero_info(self.route)

    def _continue_stream(self, module: pl.LightningModule) -> None:
        if self._global is not None:
            RandomStreams([module.device]).from_plain(self._global)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call the hook of the members' rules."""
        self._running().forward("on_train_epoch_start")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose the route before the first batch; call the hook of the members' rules."""
        if batch_idx > 0:  # resumed inside an epoch, behind the loader's draw
            self._continue_stream(pl_module)
        self._global = None
        run = self._running()
        run.settle(trainer, batch, batch_idx)
        run.forward("on_train_batch_start", batch, batch_idx)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Call the hook of the members' rules, each with its member's gradients."""
        self._running().forward("on_before_optimizer_step", optimizer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module with the first member's weights, and restore everything else."""
        self._undo(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore everything: Lightning calls no teardown hooks after an exception."""
        self._undo(trainer)

    def _undo(self, trainer: pl.Trainer) -> None:
        self._end_evaluation()
        if self._bootstrap is not None:
            self._bootstrap.undo()
        if self._run is not None:
            self._run.stop()
        optimizers = trainer.strategy.optimizers
        if len(optimizers) == 1 and isinstance(optimizers[0], MemberOptimizers):
            trainer.strategy.optimizers = [optimizers[0].optimizers[0]]
        self._bootstrap = None

    # --- evaluation ---

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        fitting = trainer.state.fn == "fit"
        if not fitting and (self._run is None or self._loaded is not None):
            self._take_loaded(module, stage)
        run = self._running()
        if self._answers is None or not self._answers.speaks_for(run):
            self._answers = Answers(run, self.combination, self.settings)
        if not fitting:
            run.activations.install()
        self._answers.begin(stage)

    def _take_loaded(self, module: pl.LightningModule, stage: str) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            raise MisconfigurationException(
                f"DeepEnsemble has no members to {stage}: fit first with this callback, or give ckpt_path of a run "
                "that had it."
            )
        self._run = EnsembleRun(module, loaded["members"], loaded["seeds"], self.settings)
        self._run.side_by_side = bool(loaded["route"]["side_by_side"])

    def _end_evaluation(self) -> None:
        if self._answers is not None:
            self._answers.end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to answer for the network."""
        self._begin(trainer, pl_module, "val")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to answer for the network."""
        self._begin(trainer, pl_module, "test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to answer for the network."""
        self._begin(trainer, pl_module, "predict")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start a new step."""
        if self._answers is not None:
            self._answers.begin_batch()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the members' predictions to the metrics; check that the step called the network."""
        if self._answers is not None:
            self._network_name = self._answers.end_batch(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the report."""
        if self._answers is not None:
            pl_module.log_dict(self._answers.report(trainer.sanity_checking), on_step=False, on_epoch=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the module's own forward pass."""
        self._end_evaluation()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end  # a prediction logs nothing
    on_test_end = on_predict_end = on_validation_end

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return all members, with the state for an exact resume."""
        if self._run is None:
            return {}
        run = self._run
        weights = self.combination.weights
        return {
            "members": self.member_states(),
            "seeds": list(run.seeds),
            "streams": run.streams.to_plain(),
            "global": RandomStreams([run.module.device]).to_plain(),
            "route": {
                "side_by_side": run.side_by_side,
                "stacked": run.members.stacked,
                "reason": run.reason,
            },
            "rules": [] if run.rules is None else run.rules.state_dict(),
            "settings": self.settings.plain(),
            "weights": None if weights is None else [float(weight) for weight in weights],
            "network": self._network_name,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the members of a checkpoint; the next start of a fit or evaluation uses them.

        Raises:
            MisconfigurationException: if their number differs from this callback's.
        """
        if not state_dict:
            return
        if len(state_dict["members"]) != self.settings.members:
            raise MisconfigurationException(
                f"the checkpoint holds {len(state_dict['members'])} members, and this run has members="
                f"{self.settings.members}: give the same number."
            )
        now, then = self.settings.plain(), state_dict["settings"]
        changed = [name for name in ("activations", "bootstrap", "lr_factors") if now[name] != then[name]]
        if changed:
            rank_zero_warn(
                "DeepEnsemble: the members of this checkpoint were trained with "
                + ", ".join(f"{name}={then[name]} (now {now[name]})" for name in changed)
                + "."
            )
        self._loaded = state_dict
        if self.settings.combine == "stack":
            self.combination.weights = state_dict["weights"]
        self._network_name = state_dict["network"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save only the first member's weights as the module's own, without storage of the others."""
        weights = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {n: v.clone() if isinstance(v, Tensor) else v for n, v in weights.items()}


def _detached_copy(module: pl.LightningModule, name: str) -> nn.Module:
    """Return a copy of a part of the module, without its Trainer."""
    trainer, module._trainer = module._trainer, None
    try:
        part = module.get_submodule(name)
        return copy.deepcopy(part)
    finally:
        module._trainer = trainer
