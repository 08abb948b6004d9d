"""Search algorithms by name, with their default settings."""

from __future__ import annotations

from collections.abc import Callable

from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm
from lightning_bpfree.methods.evolution_strategy.search.des import DES
from lightning_bpfree.methods.evolution_strategy.search.openai_es import OpenAIES
from lightning_bpfree.methods.evolution_strategy.search.pgpe import PGPE
from lightning_bpfree.methods.evolution_strategy.search.sep_cma_es import SepCMAES
from lightning_bpfree.methods.evolution_strategy.search.snes import SNES

ALGORITHMS: dict[str, Callable[[], SearchAlgorithm]] = {
    "openai_es": OpenAIES,
    "pgpe": PGPE,
    "snes": SNES,
    "sep_cma_es": SepCMAES,
    "des": DES,
}


def named(algorithm: str | SearchAlgorithm) -> SearchAlgorithm:
    """Return the algorithm of a name, or the one that is given.

    Raises:
        ValueError: for an unknown name.

    Examples:
        >>> named("snes").sigma
        0.05
    """
    if isinstance(algorithm, SearchAlgorithm):
        return algorithm
    if algorithm not in ALGORITHMS:
        names = ", ".join(map(repr, ALGORITHMS))
        raise ValueError(f"algorithm={algorithm!r}: choose {names}, or give an object of one of these classes.")
    return ALGORITHMS[algorithm]()
