"""The settings of a team, resolved, and whether they go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_bpfree.methods.team_reinforce.credit import (
    Credit,
    GlobalReward,
    Pathwise,
    StraightThrough,
    TopDown,
    WeightMax,
)
from lightning_bpfree.methods.team_reinforce.map_propagation import MapPropagation
from lightning_bpfree.methods.team_reinforce.units.exploration import Exploration, Independent
from lightning_bpfree.methods.team_reinforce.units.lateral import Boltzmann, Recurrent
from lightning_bpfree.methods.team_reinforce.units.stochastic import Softmax, StochasticUnit, unit_named

if TYPE_CHECKING:
    from lightning_bpfree.methods.team_reinforce.layer import Layer
    from lightning_bpfree.methods.team_reinforce.rule import TeamReinforce

EXPLORATIONS: dict[str, Any] = {"independent": Independent, "boltzmann": Boltzmann, "recurrent": Recurrent}
CREDITS: dict[str, Any] = {
    "reward": GlobalReward,
    "weight_max": WeightMax,
    "map_propagation": MapPropagation,
    "ste": StraightThrough,
    "pathwise": Pathwise,
}


class TeamSettings(NamedTuple):
    """What a team is.

    Args:
        units: one for all layers, or one a layer.
        output: what acts; None if nothing is drawn.
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
    def of(cls, rule: TeamReinforce) -> TeamSettings:
        """Return the settings of a rule's arguments.

        Raises:
            ValueError: if they are out of range, or do not go together.
        """
        several = [rule.unit] if isinstance(rule.unit, str | StochasticUnit) else list(rule.unit)
        units = [unit_named(unit, "unit", ("bernoulli", "sign", "gaussian")) for unit in several]
        output = None
        if rule.output is not None:
            output = unit_named(rule.output, "output", ("softmax", "gaussian", "bernoulli", "sign"))
        exploration = _named(EXPLORATIONS, rule.exploration, Exploration, "exploration")
        credit = _named(CREDITS, rule.credit, Credit, "credit")
        if not units:
            raise ValueError("unit=[]: give one unit for all layers, or one for each layer.")
        made = cls(units, output, exploration, credit, rule.evaluation, rule.eval_samples)
        made.check_units(units)
        _check_numbers(rule)
        _check_together(rule, exploration, credit, output)
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
        """What the banner says of how gradients are had."""
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


def _named(table: dict[str, Any], value: Any, kind: type, argument: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{argument}={value!r}: choose one of {', '.join(map(repr, table))}, or pass an object.")
    return table[value]()


def _check_numbers(rule: TeamReinforce) -> None:
    if not isinstance(rule.num_samples, int) or rule.num_samples < 1:
        raise ValueError(f"num_samples={rule.num_samples!r}: give a whole number of at least 1, draws of each input.")
    if rule.num_samples == 1 and rule.baseline == "leave_one_out":
        raise ValueError(
            "num_samples=1 with baseline='leave_one_out': a draw's baseline is the mean of the input's other draws. "
            "Use num_samples=2 or more, or baseline='critic', 'per_layer' or 'none'."
        )
    if rule.evaluation not in ("mean", "samples"):
        raise ValueError(f"evaluation={rule.evaluation!r}: choose 'mean' or 'samples'.")
    if rule.eval_samples < 1:
        raise ValueError(f"eval_samples={rule.eval_samples}: give at least 1.")


def _check_together(
    rule: TeamReinforce, exploration: Exploration, credit: Credit, output: StochasticUnit | None
) -> None:
    lateral = exploration.has_lateral_weights
    if lateral and type(credit) is not GlobalReward:
        raise ValueError(
            f"exploration={type(exploration).__name__} with credit={type(credit).__name__}: lateral weights learn from "
            "the reward alone. Use credit='reward', or exploration='independent'."
        )
    if lateral and rule.baseline == "none" and not rule.negative_phase:
        raise ValueError(
            f"exploration={type(exploration).__name__} with baseline='none' and negative_phase=False: what is learned "
            "would have no more to do with the gradient. Choose a baseline, or negative_phase=True."
        )
    joint = isinstance(exploration, Boltzmann) and exploration.whole_network
    if joint and not isinstance(output, Softmax):
        raise ValueError("Boltzmann(whole_network=True): the output is part of the machine; use output='softmax'.")
    if (rule.reward == "loss") != (output is None) and not callable(rule.reward) and rule.reward != "module":
        raise ValueError(
            f"reward={rule.reward!r} with output={rule.output!r}: a class is rewarded if it is drawn "
            "(output='softmax'), and a loss is differentiated if nothing is (output=None)."
        )
    if rule.reward == "step" and rule.num_samples != 1:
        raise ValueError(
            f"reward='step' with num_samples={rule.num_samples}: the training step acts once. Use num_samples=1, and "
            "baseline='none' if the reward is a temporal-difference error."
        )
    if rule.trace_decay is not None:
        _check_traces(rule, exploration, credit)


def _check_traces(rule: TeamReinforce, exploration: Exploration, credit: Credit) -> None:
    gated = isinstance(credit, MapPropagation) and credit.gate
    exact = isinstance(credit, WeightMax) and credit.exact
    biased = isinstance(credit, TopDown) and not isinstance(credit, WeightMax)
    if rule.num_samples != 1 or exploration.has_lateral_weights or gated or exact or biased or rule.output is None:
        raise ValueError(
            "trace_decay: traces are of one draw of independent units, with credit='reward', 'weight_max' or "
            "'map_propagation' (no gate, not exact) and an output that is drawn."
        )
    if isinstance(credit, StraightThrough):
        raise ValueError("trace_decay: not defined for credit='ste'.")
