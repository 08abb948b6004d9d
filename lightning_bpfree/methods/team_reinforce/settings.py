"""The settings of a team, resolved, and checks of their compatibility."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from lightning_bpfree.methods.team_reinforce.baselines import Baseline
from lightning_bpfree.methods.team_reinforce.credit import (
    Credit,
    GlobalReward,
    Pathwise,
    StraightThrough,
    TopDown,
    WeightMax,
)
from lightning_bpfree.methods.team_reinforce.layer import Layer
from lightning_bpfree.methods.team_reinforce.map_propagation import MapPropagation
from lightning_bpfree.methods.team_reinforce.rewards import Reward
from lightning_bpfree.methods.team_reinforce.units.exploration import Exploration, Independent
from lightning_bpfree.methods.team_reinforce.units.lateral import Boltzmann, Recurrent
from lightning_bpfree.methods.team_reinforce.units.stochastic import Softmax, StochasticUnit, unit_named

UnitName = Literal["bernoulli", "sign", "gaussian"]
OutputName = Literal["softmax", "gaussian", "bernoulli", "sign"]
ExplorationName = Literal["independent", "boltzmann", "recurrent"]
CreditName = Literal["reward", "weight_max", "map_propagation", "ste", "pathwise"]

EXPLORATIONS: dict[ExplorationName, Any] = {"independent": Independent, "boltzmann": Boltzmann, "recurrent": Recurrent}
CREDITS: dict[CreditName, Any] = {
    "reward": GlobalReward,
    "weight_max": WeightMax,
    "map_propagation": MapPropagation,
    "ste": StraightThrough,
    "pathwise": Pathwise,
}
_LR = 1e-3  # the learning rates by default


class TeamArguments(NamedTuple):
    """The arguments of ``TeamReinforce`` that define a team; see there."""

    unit: UnitName | StochasticUnit | Sequence[UnitName | StochasticUnit]
    output: OutputName | StochasticUnit | None
    exploration: ExplorationName | Exploration
    credit: CreditName | Credit
    num_samples: int
    baseline: Baseline
    negative_phase: bool
    reward: Reward
    trace_decay: float | None
    lateral_lr: float
    critic_lr: float
    evaluation: str
    eval_samples: int


class TeamSettings(NamedTuple):
    """The definition of a team.

    Args:
        units: one for all layers, or one a layer.
        output: the unit that draws the action; None if nothing is drawn.
        exploration: how layers draw.
        credit: how a reward becomes a gradient.
        evaluation: ``"mean"`` or ``"samples"``.
        eval_samples: how many draws the latter averages.
    """

    units: list[StochasticUnit]
    output: StochasticUnit | None
    exploration: Exploration
    credit: Credit
    evaluation: str
    eval_samples: int

    @classmethod
    def of(cls, given: TeamArguments) -> TeamSettings:
        """Return the settings that arguments describe.

        Raises:
            ValueError: if they are incompatible.
        """
        several = [given.unit] if isinstance(given.unit, str | StochasticUnit) else list(given.unit)
        units = [unit_named(unit) for unit in several]
        output = None if given.output is None else unit_named(given.output)
        exploration = EXPLORATIONS[given.exploration]() if isinstance(given.exploration, str) else given.exploration
        credit = CREDITS[given.credit]() if isinstance(given.credit, str) else given.credit
        made = cls(units, output, exploration, credit, given.evaluation, given.eval_samples)
        made.check_units(units)
        _check_numbers(given, exploration)
        _check_together(given, exploration, credit, output)
        return made

    def check_units(self, units: Sequence[StochasticUnit]) -> None:
        """Raise ValueError if such units cannot draw or learn by these settings; a network may have its own."""
        for unit in units:
            self.exploration.check(unit)
        self.credit.check(units, self.output)

    @property
    def runs_again(self) -> bool:
        """Whether parts of the network may run more than once a step."""
        return isinstance(self.credit, MapPropagation)

    @property
    def route(self) -> str:
        """How gradients are obtained, in the words of the banner."""
        if isinstance(self.credit, TopDown) and not isinstance(self.credit, WeightMax):
            return "draws forward, backprop through them"
        return "a reward for every unit, no gradient between layers"

    def cost_behind(self, layers: Sequence[Layer], num_weights: int) -> float:
        """Return what a draw costs behind its forward pass, in forward passes, by the sizes of the weights."""
        exploration = self.exploration
        if not isinstance(exploration, Boltzmann | Recurrent):
            return self.credit.backward_cost
        lateral = sum(layer.potential.shape[1] ** 2 for layer in layers[:-1]) / max(1, num_weights)
        times = exploration.sweeps if isinstance(exploration, Boltzmann) else exploration.steps - 1
        again = 2.0 * times if isinstance(exploration, Boltzmann) and exploration.whole_network else 0.0
        return self.credit.backward_cost + again + (times + 1) * lateral

    def describe(self, num_samples: int) -> dict[str, str]:
        """Return rows for the banner."""
        kinds = list(dict.fromkeys(type(unit).__name__ for unit in self.units))
        exploration = type(self.exploration).__name__.lower()
        rows = {"units": f"{', '.join(kinds)}, {exploration}, {num_samples} draws"}
        if type(self.credit) is not GlobalReward:
            rows["credit"] = type(self.credit).__name__
        return rows


def _check_numbers(given: TeamArguments, exploration: Exploration) -> None:
    if given.num_samples == 1 and given.baseline == "leave_one_out":
        raise ValueError(
            "TeamReinforce: num_samples=1 with baseline='leave_one_out': a draw's baseline is the mean of the input's "
            "other draws. Use num_samples=2 or more, or baseline='critic', 'per_layer' or 'none'."
        )
    if given.critic_lr != _LR and given.baseline not in ("critic", "per_layer"):
        raise ValueError(
            f"TeamReinforce: critic_lr={given.critic_lr} with baseline={given.baseline!r}, which has no critic: leave "
            "critic_lr out, or use baseline='critic' or 'per_layer'."
        )
    if exploration.has_lateral_weights:
        return
    kind = type(exploration).__name__
    if given.negative_phase:
        raise ValueError(
            f"TeamReinforce: negative_phase=True with exploration={kind}, which has no lateral weights: leave "
            "negative_phase out, or use exploration='boltzmann' or 'recurrent'."
        )
    if given.lateral_lr != _LR:
        raise ValueError(
            f"TeamReinforce: lateral_lr={given.lateral_lr} with exploration={kind}, which has no lateral weights: "
            "leave lateral_lr out, or use exploration='boltzmann' or 'recurrent'."
        )


def _check_together(
    given: TeamArguments, exploration: Exploration, credit: Credit, output: StochasticUnit | None
) -> None:
    lateral = exploration.has_lateral_weights
    if lateral and type(credit) is not GlobalReward:
        raise ValueError(
            f"TeamReinforce: exploration={type(exploration).__name__} with credit={type(credit).__name__}: lateral "
            "weights learn from the reward alone. Use credit='reward', or exploration='independent'."
        )
    if lateral and given.baseline == "none" and not given.negative_phase:
        raise ValueError(
            f"TeamReinforce: exploration={type(exploration).__name__} with baseline='none' and "
            "negative_phase=False: the update would not estimate the gradient. Choose a baseline, or "
            "negative_phase=True."
        )
    joint = isinstance(exploration, Boltzmann) and exploration.whole_network
    if joint and not isinstance(output, Softmax):
        raise ValueError(
            "TeamReinforce: Boltzmann(whole_network=True): the output is part of the machine; use output='softmax'."
        )
    if (given.reward == "loss") != (output is None) and not callable(given.reward) and given.reward != "module":
        raise ValueError(
            f"TeamReinforce: reward={given.reward!r} with output={given.output!r}: a class is rewarded if it is drawn "
            "(output='softmax'), and a loss is differentiated if nothing is (output=None)."
        )
    if given.reward == "step" and given.num_samples != 1:
        raise ValueError(
            f"TeamReinforce: reward='step' with num_samples={given.num_samples}: the training step acts once. "
            "Use num_samples=1, and baseline='none' if the reward is a temporal-difference error."
        )
    if given.trace_decay is not None:
        _check_traces(given, exploration, credit)


def _check_traces(given: TeamArguments, exploration: Exploration, credit: Credit) -> None:
    gated = isinstance(credit, MapPropagation) and credit.gate
    exact = isinstance(credit, WeightMax) and credit.exact
    biased = isinstance(credit, TopDown) and not isinstance(credit, WeightMax)
    if given.num_samples != 1 or exploration.has_lateral_weights or gated or exact or biased or given.output is None:
        raise ValueError(
            "TeamReinforce: trace_decay: traces are of one draw of independent units, with credit='reward', "
            "'weight_max' or 'map_propagation' (no gate, not exact) and an output that is drawn."
        )
    if isinstance(credit, StraightThrough):
        raise ValueError("TeamReinforce: trace_decay: not defined for credit='ste'.")
