"""Teams in settings of their own, for the properties of every rule."""

from functools import partial

from lightning_bpfree import TeamReinforce

RULES = {
    "team_critic": partial(TeamReinforce, num_samples=1, baseline="critic"),
    "team_boltzmann": partial(TeamReinforce, num_samples=2, exploration="boltzmann"),
    "team_weight_max": partial(TeamReinforce, num_samples=1, baseline="none", credit="weight_max"),
    "team_map": partial(TeamReinforce, num_samples=1, baseline="none", unit="gaussian", credit="map_propagation"),
}
VARIANTS = {"team_critic", "team_boltzmann"}
EXCEPTIONS = {
    **{(name, "several_dataloaders"): "one call of the network a step" for name in RULES},
    ("team_critic", "accumulation_is_the_mean_of_micro_batches"): "its critic learns when the optimizer steps",
    ("team_boltzmann", "random_streams_move_as_in_a_plain_step"): "its draws of an input are rows of the batch",
}

MAP = {"unit": "gaussian", "credit": "map_propagation", "baseline": "critic", "num_samples": 1}
KILLED = {
    "team_boltzmann": (partial(TeamReinforce, exploration="boltzmann", baseline="per_layer"), {}),
    "team_map": (partial(TeamReinforce, **MAP, learning_rates=(1.0, 0.1)), {}),
}
