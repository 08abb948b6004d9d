"""Search algorithms by name, with their default settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_bpfree.core.arguments import checked
from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm
from lightning_bpfree.methods.evolution_strategy.search.des import DES
from lightning_bpfree.methods.evolution_strategy.search.openai_es import OpenAIES
from lightning_bpfree.methods.evolution_strategy.search.pgpe import PGPE
from lightning_bpfree.methods.evolution_strategy.search.sep_cma_es import SepCMAES
from lightning_bpfree.methods.evolution_strategy.search.snes import SNES

Algorithm = Literal["openai_es", "pgpe", "snes", "sep_cma_es", "des"]
ALGORITHMS: dict[Algorithm, Callable[[], SearchAlgorithm]] = {
    "openai_es": OpenAIES,
    "pgpe": PGPE,
    "snes": SNES,
    "sep_cma_es": SepCMAES,
    "des": DES,
}


@checked
def named(algorithm: Algorithm | SearchAlgorithm) -> SearchAlgorithm:
    """Return the algorithm of a name, or the one that is given.

    Raises:
        ValueError: for an unknown name.

    Examples:
        >>> named("snes").sigma
        0.05
    """
    if isinstance(algorithm, SearchAlgorithm):
        return algorithm
    return ALGORITHMS[algorithm]()
