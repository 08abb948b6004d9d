"""Evolution strategies in settings of their own, for the properties of every rule."""

from functools import partial

from lightning_bpfree import EvolutionStrategy, OpenAIES, SepCMAES


def sep_cma(**settings):
    return EvolutionStrategy(SepCMAES(0.05), 8, **settings)


RULES = {
    "evolution_openai": partial(EvolutionStrategy, OpenAIES(0.05, "raw"), 8),
    "evolution_low_rank": partial(EvolutionStrategy, OpenAIES(0.05, "z_score"), 8, rank=1, chunk_size=4),
    "evolution_snes_loop": partial(EvolutionStrategy, "snes", 8, chunk_size=1),
    "evolution_pgpe": partial(EvolutionStrategy, "pgpe", 8),
    "evolution_sep_cma": sep_cma,
    "evolution_des": partial(EvolutionStrategy, "des", 8, noise="independent"),
}
VARIANTS = {"evolution_des", "evolution_low_rank", "evolution_pgpe", "evolution_sep_cma"}
EXCEPTIONS = {
    (f"evolution_{name}", "accumulation_is_the_mean_of_micro_batches"): "its deviations step with the optimizer"
    for name in ("snes_loop", "pgpe", "sep_cma", "des")
}

POPULATION_RANKS = {
    "openai_es": partial(EvolutionStrategy, population_size=8, chunk_size=1),
    "snes": partial(EvolutionStrategy, "snes", 8, chunk_size=1),
    "sep_cma_es": partial(EvolutionStrategy, "sep_cma_es", 9, chunk_size=1),
    "pgpe": partial(EvolutionStrategy, "pgpe", 8, chunk_size=1),
    "low_rank": partial(EvolutionStrategy, population_size=8, rank=1),
}
KILLED = {
    "openai_es": (partial(EvolutionStrategy, population_size=8, rank=1), {}),
    "snes": (partial(EvolutionStrategy, "snes", 8, chunk_size=1), {}),
    "pgpe": (partial(EvolutionStrategy, "pgpe", 8), {}),
    "sep_cma_es": (partial(EvolutionStrategy, "sep_cma_es", 8), {"accumulate_grad_batches": 2}),
    "des": (partial(EvolutionStrategy, "des", 8), {}),
}
