"""Teams of REINFORCE agents: every unit of a network is an agent, and all receive the same reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bpfree.core.arguments import (
    FractionBelowOne,
    NonEmpty,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    checked,
)
from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules
from lightning_bpfree.core.labels import LabelsOf
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.core.step import Estimate, Step, check_finite
from lightning_bpfree.methods.team_reinforce.activations import Units, find_sites
from lightning_bpfree.methods.team_reinforce.baselines import Baseline, Baselines
from lightning_bpfree.methods.team_reinforce.chance import ChanceCheck
from lightning_bpfree.methods.team_reinforce.credit import Credit, TopDown
from lightning_bpfree.methods.team_reinforce.eligibility_traces import Traces
from lightning_bpfree.methods.team_reinforce.evaluation_report import EvaluationReport
from lightning_bpfree.methods.team_reinforce.layer_rates import LayerRates
from lightning_bpfree.methods.team_reinforce.network import TeamNetwork
from lightning_bpfree.methods.team_reinforce.rewards import Reward, Rewards, take_action
from lightning_bpfree.methods.team_reinforce.settings import (
    CreditName,
    ExplorationName,
    OutputName,
    TeamArguments,
    TeamSettings,
    UnitName,
)
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass
from lightning_bpfree.methods.team_reinforce.units.exploration import Exploration
from lightning_bpfree.methods.team_reinforce.units.stochastic import StochasticUnit
from lightning_bpfree.training.network_rule import NetworkRule


class TeamReinforce(NetworkRule):
    """Trains a network as a team of stochastic agents that learn from one reward per sample.

    Activations of an unmodified network become stochastic units, and an action is drawn from the network's output. A
    layer learns from its input, its draw, the mean of the draw, and the reward: no derivative crosses layers (except
    with ``credit="ste"`` and ``"pathwise"``, which are backprop and serve as baselines).

    **The reward trains the network; the loss of the user's training step is only logged.** The loss does train
    parameters outside of the network, such as a critic's. While the rule is active, and after the fit, the network
    computes with stochastic units; in evaluation, it returns scores ``(B, C)`` according to ``evaluation``.

    These settings are biased by design: ``credit="weight_max"`` (unless exact) and ``"ste"``;
    ``exploration="boltzmann"`` without negative phase in layers above the first, unless the baseline is ``"per_layer"``
    or the machine spans the whole network; ``exploration="recurrent"`` without negative phase.

    Args:
        units: which activations: shell-style patterns of names (``"net.*.act"``), types (``nn.ReLU``) or their names;
            None for the network's own stochastic units, or else all activations of a known type.
        network: name of the submodule that maps inputs to scores; None for the only child with parameters, ``""`` for
            the LightningModule itself.
        unit: the kind of unit: ``"bernoulli"`` (0 and 1), ``"sign"`` (-1 and 1), ``"gaussian"``, or a unit such as
            ``Gaussian(variance=0.3)``; a list for one per layer.
        output: how the action is drawn from the network's output: ``"softmax"`` (a class), a unit such as
            ``Gaussian(0.1, "linear")``, or None: nothing is drawn, and the last layer learns by the derivative of the
            reward.
        exploration: ``"independent"``; ``"boltzmann"`` (symmetric lateral weights, Gibbs sweeps) or ``"recurrent"``
            (micro-steps), with lateral weights that belong to the rule; or ``Boltzmann(...)``, ``Recurrent(...)``.
        credit: ``"reward"`` (REINFORCE), ``"weight_max"``, ``"map_propagation"`` (Gaussian units), ``"ste"`` (discrete
            units) or ``"pathwise"`` (Gaussian units); or ``WeightMax(...)``, ``MapPropagation(...)``, ....
        num_samples: draws per input, ``M``; they are folded into the batch.
        baseline: ``"leave_one_out"`` (the other draws of the input; ``num_samples >= 2``), ``"critic"`` (a small
            network that reads the input), ``"per_layer"`` (a critic for each layer's input) or ``"none"``.
        negative_phase: subtract the mean update of lateral weights, estimated with a second draw.
        reward: ``"class"``: 1 if the drawn class is the label, else -1. ``"loss"``: minus the cross-entropy of each
            row, with ``output=None``. ``"module"``: the module's method ``reward(batch, action)``. ``"step"``: the
            training step returns ``{"loss", "action", "reward"}`` (and ``"done"``) itself. Or a function ``(batch,
            action)``. It gives one number per row: row ``m * B + b`` of the action is draw ``m`` of sample ``b``.
        trace_decay: decay of eligibility traces per step (gamma times lambda); None for no traces. Each row of the
            batch is then an environment that continues. With ``reward="step"``, rewards are temporal-difference errors.
        lateral_lr: learning rate (Adam) of lateral weights; results are sensitive to it, and it is best below the
            network's.
        critic_lr: learning rate (Adam) of critics.
        learning_rates: factors on the optimizer's learning rate, one for each layer of units and one for the output's;
            or one number, the ratio between successive layers (0.1: 1, 0.1, 0.01, ...).
        evaluation: ``"mean"``: units return their means (mean field); ``"samples"``: the average over draws.
        eval_samples: number of draws in that average.
        labels: extracts the labels from a batch that is not a pair (inputs, labels).
        **settings: see :class:`TrainingRule`.

    Raises:
        ValueError: for arguments out of range, or that are incompatible.

    Examples:
        >>> TeamReinforce(credit="weight_max", num_samples=8).describe()["units"]
        'Bernoulli, independent, 8 draws'

    References:
        S. Chung, "Structural Credit Assignment with Coordinated Exploration", 2023, arXiv 2307.13256. R. J. Williams,
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning", 1992.
    """

    citation: ClassVar[str] = (
        "@article{chung2023structural, title={Structural Credit Assignment with Coordinated Exploration}, "
        "author={Chung, Stephen}, journal={arXiv preprint arXiv:2307.13256}, year={2023}}"
    )
    logged: ClassVar[dict[str, str]] = {
        **NetworkRule.logged,
        "bpfree/team_reinforce/reward": "mean reward of the batch",
        "bpfree/team_reinforce/<stage>_acc_<way>": "accuracy of an evaluation, with sampled or with mean units",
        "bpfree/team_reinforce/<stage>_reward_<way>": "mean reward of an evaluation, with sampled or with mean units",
    }
    estimates_user_loss: ClassVar[bool] = False

    @checked
    def __init__(
        self,
        units: Units | None = None,
        network: str | None = None,
        *,
        unit: UnitName | StochasticUnit | Annotated[Sequence[UnitName | StochasticUnit], NonEmpty()] = "bernoulli",
        output: OutputName | StochasticUnit | None = "softmax",
        exploration: ExplorationName | Exploration = "independent",
        credit: CreditName | Credit = "reward",
        num_samples: PositiveInt = 4,
        baseline: Baseline = "leave_one_out",
        negative_phase: bool = False,
        reward: Reward = "class",
        trace_decay: FractionBelowOne | None = None,
        lateral_lr: PositiveFloat = 1e-3,
        critic_lr: PositiveFloat = 1e-3,
        learning_rates: Annotated[Sequence[NonNegativeFloat], NonEmpty()] | NonNegativeFloat | None = None,
        evaluation: Literal["mean", "samples"] = "mean",
        eval_samples: PositiveInt = 16,
        labels: LabelsOf | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.units, self.network, self.unit, self.output = units, network, unit, output
        self.exploration, self.credit, self.num_samples, self.baseline = exploration, credit, num_samples, baseline
        self.negative_phase, self.reward, self.trace_decay = negative_phase, reward, trace_decay
        self.lateral_lr, self.critic_lr, self.learning_rates = lateral_lr, critic_lr, learning_rates
        self.evaluation, self.eval_samples, self.labels = evaluation, eval_samples, labels
        self._rewards, self._baselines = Rewards(reward, labels), Baselines(baseline, critic_lr)
        self._lateral = AuxiliaryModules("adam", lateral_lr)
        self._traces: Traces | None = None
        self._arguments: TeamArguments | None = None
        self._rank = 0
        self._report = EvaluationReport(labels)
        self._chance = ChanceCheck()
        self.resolve()

    def resolve(self) -> None:
        """Build the settings of the team; lateral weights, critics and traces are kept."""
        super().resolve()
        arguments = TeamArguments(**{name: getattr(self, name) for name in TeamArguments._fields})
        if arguments != self._arguments:
            self._team, self._arguments = TeamSettings.of(arguments), arguments
        self.reevaluates = self._team.runs_again
        self._rewards.reward, self._rewards.labels, self._report.labels = self.reward, self.labels, self.labels
        self._baselines.kind = self.baseline
        self._baselines.own.configure("adam", self.critic_lr)
        self._lateral.configure("adam", self.lateral_lr)
        if self.trace_decay is None:
            self._traces = None
        else:
            self._traces = Traces(self.trace_decay) if self._traces is None else self._traces
            self._traces.decay = self.trace_decay
        self.learning_rate_factors()  # looks at the numbers

    # --- the network's forward pass ---

    def find_parts(self, name: str, network: nn.Module) -> dict[str, nn.Module]:
        """Return the activations that become units, by name."""
        sites = find_sites(network, name, self.units)
        self._team.check_units([site for site in sites.values() if isinstance(site, StochasticUnit)])
        return sites

    def override(self, network: nn.Module, parts: dict[str, nn.Module]) -> TeamNetwork:
        """Return the network with stochastic units."""
        return TeamNetwork(network, parts, self._team, self._lateral, self._own_seed)

    def made_of(self) -> Any:
        """Return the settings that determine the network's forward pass."""
        return self._team, self.units

    def start_over(self) -> None:
        """Start with new lateral weights, critics and traces."""
        self._lateral = AuxiliaryModules("adam", self.lateral_lr)
        self._baselines = Baselines(self.baseline, self.critic_lr)
        self._traces = None if self.trace_decay is None else Traces(self.trace_decay)

    def auxiliary(self) -> Mapping[str, AuxiliaryModules]:
        """Return lateral weights and critics."""
        return {"lateral": self._lateral, "critics": self._baselines.own}

    def on_batch_settled(self, succeeded: bool) -> None:
        """Keep or drop the updates of lateral weights, critics and traces."""
        super().on_batch_settled(succeeded)
        if self._traces is not None:
            self._traces.settle(succeeded)

    def learning_rate_factors(self) -> LayerRates | None:
        """Return the factors of the layers, which are identified when they run."""
        return None if self.learning_rates is None else LayerRates(self.learning_rates)

    @property
    def _network(self) -> TeamNetwork | None:
        assert self._override is None or isinstance(self._override, TeamNetwork)
        return self._override

    def _own_seed(self) -> int:
        return (self.record.seed if self.seed is None else self.seed) or 0

    # --- one fit ---

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Replace the activations."""
        super().check(trainer, module, slots)
        self._rank = trainer.global_rank
        if self.record.batches == 0:
            self._chance = ChanceCheck()

    def estimate(self, step: Step) -> Estimate:
        """Return the user's loss, and the negative gradient of the mean reward."""
        assert self._network is not None
        settings, network, credit = self._team, self._network, self._team.credit
        generator = torch.Generator(step.module.device).manual_seed(mix(step.seed, self._rank))  # type: ignore[arg-type]
        leaves = isinstance(credit, TopDown)
        options = {"negative_phase": self.negative_phase, "leaves": leaves, "again": self.reevaluates}
        work = TeamPass(step, self.num_samples, generator, **options)
        self.begin_batch()
        with network.in_training(work):
            loss = step.loss(cost=float(self.num_samples))
        if not work.layers:
            raise self.never_called()
        if self.reward == "step":
            take_action(step, work)
        check_finite({f"the potentials of {layer.name}": layer.potential for layer in work.layers})
        rewards, by_output = self._rewards(step, work)
        if by_output is not None:
            check_finite({"the derivative of the reward": by_output})
        advantages = self._baselines.advantages(work, rewards, self.record.seed or 0)
        self._learn_laterally(work, advantages)
        parameters = [slot.parameter for slot in step.trained]
        if isinstance(self._factors, LayerRates):
            self._factors.find([layer.potential for layer in work.layers])
        if self._traces is None:
            found = credit.gradients(work, advantages, parameters, by_output)
        else:
            done = step.output.get("done") if isinstance(step.output, dict) else None
            found = self._traces.gradients(work, advantages[-1], parameters, credit, done)
        if self.reevaluates:
            check_finite({f"the potentials of {layer.name}": layer.potential for layer in work.layers})
        step.forward_evals += self.num_samples * settings.cost_behind(work.layers, network.num_weights)
        if self.reward == "class":
            self._chance.add(rewards, work.layers[-1].potential.shape[-1])
        metrics = {"reward": rewards.mean()}
        return Estimate(loss.detach(), self._descending(step, loss, found), metrics)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the team learned nothing in its first epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._chance.report()

    def _learn_laterally(self, work: TeamPass, advantages: Sequence[Tensor]) -> None:
        for layer, advantage in zip(work.layers[:-1], advantages, strict=False):
            if layer.drawn is not None and layer.drawn.lateral is not None:
                ascent = layer.drawn.lateral(advantage) / len(advantage)
                self._lateral.propose(f"lateral/{layer.name}", [-ascent])

    def _descending(self, step: Step, loss: Tensor, found: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return named gradients to descend by; what the team does not reach learns from the user's loss."""
        if all(gradient is None for gradient in found):
            raise MisconfigurationException(
                f"TeamReinforce(params={self.params!r}): none of the trained parameters feeds the units "
                f"{', '.join(site.name for site in self._network.sites) if self._network else ''} or the output. "
                "Select others by params=..., and call the network with gradients enabled (no torch.no_grad)."
            )
        others = [slot for slot, gradient in zip(step.trained, found, strict=True) if gradient is None]
        of_loss: list[Tensor | None] = [None] * len(others)
        if others and loss.requires_grad:
            check_finite({"the loss": loss})
            own = [slot.parameter for slot in others]
            of_loss = list(torch.autograd.grad(loss, own, allow_unused=True))
        made = {
            slot.name: gradient.detach().neg().to(slot.parameter.dtype)
            for slot, gradient in zip(step.trained, found, strict=True)
            if gradient is not None
        }
        for slot, gradient in zip(others, of_loss, strict=True):
            made[slot.name] = torch.zeros_like(slot.parameter) if gradient is None else gradient
        return made

    # --- evaluation ---

    def predict_as_trained(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make draws reproducible in every evaluation, and log the results of means and of draws."""
        super().predict_as_trained(trainer, module)
        if self._network is not None and self._network.installed:
            self._network.generator = None
            self._report.begin(trainer, self._network, self.reward == "class")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Log the results of means and of draws."""
        self._report.log(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Log the results of means and of draws."""
        self._report.log(trainer, pl_module, batch)

    def _end_of_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report.end()

    on_validation_end = on_test_end = _end_of_evaluation

    def describe(self) -> dict[str, str]:
        """Return rows for the banner."""
        rows = self._team.describe(self.num_samples)
        if self._network is not None:
            rows["in place of"] = ", ".join(site.name for site in self._network.sites)
        return {**rows, "route": self._team.route}

    # --- checkpoints ---

    def rule_state(self) -> dict[str, Any]:
        """Return lateral weights, critics and traces."""
        traces = {} if self._traces is None else {key: total.clone() for key, total in self._traces.sums.items()}
        return {**super().rule_state(), "traces": traces}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Restore lateral weights, critics and traces."""
        self.resolve()
        super().load_rule_state(state)
        if self._traces is not None:
            self._traces.sums = dict(state["traces"])
