"""Every rule of the package holds to every property of `conformance.py`."""

from functools import partial

import pytest
from conformance import PROPERTIES

from lightning_bpfree import (
    Backprop,
    EvolutionStrategy,
    ForwardForward,
    ForwardGradient,
    LocalLoss,
    OpenAIES,
    SepCMAES,
    TeamReinforce,
    ZerothOrder,
)

ONE_BLOCK = [["inner", "frozen", "norm", "again", "drop"]]  # of `Tied`, in the order in which they run

RULES = {
    "backprop": Backprop,
    "evolution_openai": partial(EvolutionStrategy, OpenAIES(0.05, "raw"), 8),
    "evolution_low_rank": partial(EvolutionStrategy, OpenAIES(0.05, "z_score"), 8, rank=1, chunk_size=4),
    "evolution_snes_loop": partial(EvolutionStrategy, "snes", 8, chunk_size=1),
    "evolution_pgpe": partial(EvolutionStrategy, "pgpe", 8),
    "evolution_sep_cma": lambda **settings: EvolutionStrategy(SepCMAES(0.05), 8, **settings),
    "evolution_des": partial(EvolutionStrategy, "des", 8, noise="independent"),
    "forward_gradient_one": ForwardGradient,
    "forward_gradient_loop": partial(ForwardGradient, 3, chunk_size=1, orthogonal=True),
    "forward_gradient_vectorised": partial(ForwardGradient, 3, chunk_size=2, directions="rademacher"),
    "local_guess_weights": partial(ForwardGradient, guess=LocalLoss(blocks=ONE_BLOCK, network="net", update="freeze")),
    "local_guess_activations": partial(
        ForwardGradient, guess=LocalLoss(blocks=ONE_BLOCK, network="net", update="freeze"), space="activations"
    ),
    "local_guess_local": partial(
        ForwardGradient,
        guess=LocalLoss("mlp", blocks=ONE_BLOCK, network="net", update="reset"),
        target="local",
        space="activations",
    ),
    "forward_forward_goodness": partial(ForwardForward, ONE_BLOCK, network="net"),
    "forward_forward_readout": partial(ForwardForward, ONE_BLOCK, network="net", prediction="readout"),
    "team_critic": partial(TeamReinforce, num_samples=1, baseline="critic"),
    "team_boltzmann": partial(TeamReinforce, num_samples=2, exploration="boltzmann"),
    "team_weight_max": partial(TeamReinforce, num_samples=1, baseline="none", credit="weight_max"),
    "team_map": partial(TeamReinforce, num_samples=1, baseline="none", unit="gaussian", credit="map_propagation"),
    "zeroth_order_central": partial(ZerothOrder, 2),
    "zeroth_order_forward": partial(ZerothOrder, 2, scheme="forward", directions="rademacher"),
}

# Settings whose way through the code is nearly that of another one; they take their turn in the slow set.
VARIANTS = {
    "evolution_des",
    "evolution_low_rank",
    "evolution_pgpe",
    "evolution_sep_cma",
    "forward_gradient_loop",
    "local_guess_activations",
    "local_guess_local",
    "team_critic",
    "team_boltzmann",
    "zeroth_order_forward",
}
SLOW = pytest.mark.slow

# What a rule refuses, or does otherwise on purpose; tests of its own show how.
EXCEPTIONS = {
    **{
        (f"evolution_{name}", "accumulation_is_the_mean_of_micro_batches"): "its deviations step with the optimizer"
        for name in ("snes_loop", "pgpe", "sep_cma", "des")
    },
    ("local_guess_weights", "several_dataloaders"): "labels are those of one call",
    ("local_guess_activations", "several_dataloaders"): "labels are those of one call",
    ("local_guess_local", "several_dataloaders"): "labels are those of one call",
    ("local_guess_weights", "the_signature_is_kept"): "needs labels",
    ("local_guess_activations", "the_signature_is_kept"): "needs labels",
    ("local_guess_local", "the_signature_is_kept"): "needs labels",
    **{
        (f"team_{name}", holds): why
        for name in ("critic", "boltzmann", "weight_max", "map")
        for holds, why in (
            ("several_dataloaders", "one call of the network a step"),
            ("the_signature_is_kept", "labels"),
        )
    },
    ("team_critic", "accumulation_is_the_mean_of_micro_batches"): "its critic learns when the optimizer steps",
    ("team_boltzmann", "random_streams_move_as_in_a_plain_step"): "its draws of an input are rows of the batch",
    ("forward_forward_goodness", "several_dataloaders"): "one call of the network a step",
    ("forward_forward_readout", "several_dataloaders"): "one call of the network a step",
    ("forward_forward_goodness", "the_signature_is_kept"): "needs labels",
    ("forward_forward_readout", "the_signature_is_kept"): "needs labels",
    ("forward_forward_goodness", "other_parameters_stay_untouched"): "refuses to train the unused last layer alone",
    ("forward_forward_goodness", "random_streams_move_as_in_a_plain_step"): "its one pass has twice the rows",
}


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("rule", [pytest.param(rule, marks=SLOW) if rule in VARIANTS else rule for rule in RULES])
def test_rule(rule, holds):
    if (rule, holds.__name__) not in EXCEPTIONS:
        holds(RULES[rule])
