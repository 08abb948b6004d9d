"""Evolution strategies: a population of perturbed modules, and the search gradient from its fitness."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_bpfree.core.arguments import AtLeastTwo, Name, NonNegativeFloat, Patterns, PositiveInt, checked
from lightning_bpfree.core.exchange import ScalarExchange
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.core.step import Estimate, Step, loss_of
from lightning_bpfree.core.vectorizing import ChunkSize
from lightning_bpfree.methods.evolution_strategy.population.coordinates import Coordinates
from lightning_bpfree.methods.evolution_strategy.population.noise import NoiseKind
from lightning_bpfree.methods.evolution_strategy.population.population import directions_of
from lightning_bpfree.methods.evolution_strategy.population_passes import PopulationPasses
from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm
from lightning_bpfree.methods.evolution_strategy.search.registry import Algorithm, named
from lightning_bpfree.training.precision import computed_in, smallest_sigma
from lightning_bpfree.training.ranks import mean_over_ranks
from lightning_bpfree.training.training_rule import TrainingRule


class EvolutionStrategy(TrainingRule):
    """Trains with the fitness of a population of perturbed modules, using only forward passes.

    Each mini-batch is a generation: all members see the same samples and the same random numbers (dropout). The
    algorithm turns their fitness into a search gradient, which the user's optimizer descends. ``SGD(lr=1)`` gives the
    classical update of SNES, Sep-CMA-ES and DES; OpenAI-ES and PGPE are usually run with Adam. Nothing needs a
    derivative: the objective may be a reward or an accuracy.

    Cost: ``1 + population_size`` forward passes per generation; the extra one evaluates the mean, for logging.

    Args:
        algorithm: ``"openai_es"``, ``"pgpe"``, ``"snes"``, ``"sep_cma_es"``, ``"des"``, or an object of one of these
            classes with other settings.
        population_size: number of members ``N``, at least 2; even if mirrored.
        mirrored: whether members come in pairs of opposite noise; None for the algorithm's default (True for OpenAI-ES
            and PGPE).
        rank: rank of the weight noise; None for full rank. At low rank a member costs little more than inference on its
            samples, because all members share the products with the weights. Needs ``"openai_es"``.
        objective: key in the mapping that the training step returns; None for its loss. Lightning and other callbacks
            get as ``"loss"`` the value that is minimized: the objective, negated if it is maximized.
        maximize: whether the objective is a reward rather than a loss.
        weight_decay: lambda >= 0; adds ``lambda * parameters`` to the search gradient. With ``SGD(lr=1)`` the mean
            shrinks by this share in each generation.
        noise: ``"table"`` (slices of one table of normal numbers, fast) or ``"independent"`` (new draws).
        chunk_size: members in one vectorized pass; 1 for a loop; ``"auto"`` chooses by the module's structure,
            ``"fastest"`` times both.
        params: shell-style patterns of the parameters to train; None for all.
        **settings: see :class:`TrainingRule`; here ``on_nonfinite="skip"`` is the default, because one failed member
            need not stop a run. With rank-based shaping, an infinite loss gets the worst rank.

    Raises:
        ValueError: for arguments out of range, or that are incompatible.

    Examples:
        >>> rule = EvolutionStrategy("snes", population_size=32)
        >>> rule.describe()["a step"]
        '33 forwards'
        >>> from lightning_bpfree import OpenAIES
        >>> EvolutionStrategy(OpenAIES(sigma=0.02), population_size=64, rank=1).rank
        1

    References:
        T. Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017, arXiv
        1703.03864. R. T. Lange and H. Sprekeler, "Lottery Tickets in Evolutionary Optimization", 2023, arXiv
        2306.00045. B. Sarkar et al., "Evolution Strategies at the Hyperscale", 2025, arXiv 2511.16652 (low rank).
    """

    citation: ClassVar[str] = (
        "@article{salimans2017evolution, title={Evolution Strategies as a Scalable Alternative to Reinforcement "
        "Learning}, author={Salimans, Tim and Ho, Jonathan and Chen, Xi and Sidor, Szymon and Sutskever, Ilya}, "
        "journal={arXiv preprint arXiv:1703.03864}, year={2017}}"
    )
    exchanges_scalars: bool = True
    logged: ClassVar[dict[str, str]] = {
        **TrainingRule.logged,
        "bpfree/evolution_strategy/fitness_mean": "mean loss of the population, of members with a finite loss",
        "bpfree/evolution_strategy/fitness_std": "standard deviation of the loss over the population",
        "bpfree/evolution_strategy/fitness_best": "smallest loss of the population",
        "bpfree/evolution_strategy/sigma": "mean standard deviation of the perturbations, in units of the parameters",
    }
    backpropagates: ClassVar[bool] = False
    of_a_fit = (*TrainingRule.of_a_fit, "_slots", "_coordinates")

    @checked
    def __init__(
        self,
        algorithm: Algorithm | SearchAlgorithm = "openai_es",
        population_size: AtLeastTwo = 64,
        mirrored: bool | None = None,
        rank: PositiveInt | None = None,
        objective: Name | None = None,
        maximize: bool = False,
        weight_decay: NonNegativeFloat = 0.0,
        noise: NoiseKind = "table",
        chunk_size: ChunkSize = "auto",
        *,
        params: Patterns | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params=params, **{"on_nonfinite": "skip", **settings})
        self.algorithm: SearchAlgorithm = copy.deepcopy(named(algorithm))  # whose state is this rule's own
        self.population_size, self.mirrored, self.rank = population_size, mirrored, rank
        self.objective, self.maximize = objective, maximize
        self.weight_decay, self.noise, self.chunk_size = weight_decay, noise, chunk_size
        self.masks: Mapping[str, Tensor] | None = None
        self._slots: ParameterSlots | None = None
        self._coordinates: Coordinates | None = None  # of the last batch
        self._passes = PopulationPasses(chunk_size, type(self).__name__)
        self._told_flat = False
        self._given: tuple[SearchAlgorithm, dict[str, Any]] | None = None
        self.resolve()

    def resolve(self) -> None:
        """Check that algorithm, population and rank are compatible."""
        super().resolve()
        self.algorithm = named(self.algorithm)
        self.algorithm.check()
        if self._given is None or self._given[0] is not self.algorithm:
            self._given = self.algorithm, self.algorithm.state_dict()
        directions_of(self.population_size, self._in_pairs)
        if self.rank is not None:
            self.algorithm.check_low_rank()
        self._passes.chunk_size = self.chunk_size

    @property
    def _in_pairs(self) -> bool:
        return self.algorithm.mirrored if self.mirrored is None else self.mirrored

    # --- what a companion may ask, such as LotteryTicket ---

    def restrict(self, masks: Mapping[str, Tensor] | None) -> None:
        """Search only where the masks are True, from the next batch on; :meth:`restart` the search if they changed.

        Args:
            masks: name -> boolean tensor of the parameter's shape; parameters without a mask are searched completely.
                None removes all masks.

        Raises:
            ValueError: for low-rank noise, which cannot be masked, or a mask that matches no parameter.
        """
        if masks is not None and self._slots is not None:
            unknown = sorted(set(masks) - {slot.name for slot in [*self._slots, *self._slots.rest]})
            if unknown:
                raise ValueError(f"there are masks for {', '.join(unknown)}, but no parameters with these names.")
        if masks is not None and self.rank is not None:
            self.algorithm.check_low_rank(masks)
        self.masks = masks

    def start_over(self) -> None:
        """Restart the search with the settings given to the constructor."""
        self.restart()
        assert self._given is not None, "resolve comes first"
        self.algorithm.load_state_dict(self._given[1])
        self._told_flat = False

    def restart(self) -> None:
        """Reset the algorithm's learned state, including the standard deviations."""
        self.algorithm.restart()
        self._passes.restart()
        self._coordinates = None

    def std(self) -> Params | None:
        """Return the standard deviations by name, zero where a mask is False.

        None if all share one number, and before the first fit.
        """
        if not self.algorithm.per_coordinate or self._slots is None:
            return None
        params = {slot.name: slot.parameter.detach() for slot in self._slots.trainable()}
        coordinates = Coordinates(params, self.masks) if self._coordinates is None else self._coordinates
        flat = self.algorithm.std.expand(coordinates.dim).to(coordinates.device, coordinates.dtype)
        return coordinates.unflatten(flat)

    # --- a generation ---

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Refuse a sigma below the rounding error."""
        self.computes_in(computed_in(trainer, module))
        self._passes.restart()
        self._slots, self._coordinates = slots, None
        if self.algorithm.steps:
            rank_zero_info(
                f"EvolutionStrategy continues a search of {self.algorithm.steps} steps; restart() begins a new one."
            )

    def computes_in(self, dtype: torch.dtype) -> None:
        """Refuse a sigma below the rounding error, for example under autocast inside the training step."""
        if dtype == torch.float64:
            dtype = torch.float32  # in which fitness is compared, so that ranks agree on it
        if self.algorithm.sigma < smallest_sigma(dtype):
            raise MisconfigurationException(
                f"EvolutionStrategy: sigma={self.algorithm.sigma:g} is lost in the rounding of {dtype}: give at least "
                f"sigma={smallest_sigma(dtype):.1g}, or train in precision='32-true'."
            )

    def read(self, output: Any) -> Tensor:
        """Return the objective, with the sign for which smaller is better."""
        if self.objective is not None and output is not None:
            if not isinstance(output, Mapping) or self.objective not in output:
                found = sorted(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
                raise RefusedError(
                    f"objective={self.objective!r} is not in the output of training_step ({found}): return a dict with "
                    "this key, or leave objective=None."
                )
            output = output[self.objective]
        value = loss_of(output)
        return -value if self.maximize else value

    def estimate(self, step: Step) -> Estimate:
        """Return the loss of the mean, and the search gradient of one generation."""
        with torch.no_grad():
            loss = step.loss()
        params = step.params
        layout = self.algorithm.layout
        population = self.algorithm.ask(
            params,
            self.population_size,
            step.seed,
            mirrored=self._in_pairs,
            rank=self.rank,
            masks=self.masks,
            noise=self.noise,
        )
        self._coordinates = population.coordinates
        if layout is not None and layout != self.algorithm.layout:
            rank_zero_info(
                "EvolutionStrategy: the searched parameters have changed; those that remain keep their state."
            )
        fitness = step.measure(
            self.population_size,
            lambda members: self._passes.fitness(step, population, members),
            infinite=self.algorithm.ranks_fitness,
        )
        finite = fitness[torch.isfinite(fitness)].double()
        metrics: dict[str, Tensor | float] = {
            "fitness_mean": finite.mean(),
            "fitness_std": finite.std(correction=0),
            "fitness_best": fitness.min(),
            "sigma": self.algorithm.std.mean(),
        }
        if bool((fitness == fitness[0]).all()):
            self._say_flat(float(fitness[0]))
            return Estimate(loss, {n: torch.zeros_like(p) for n, p in params.items()}, metrics, informative=False)
        gradients = self.algorithm.tell(population, fitness)
        if self.weight_decay:
            gradients = {
                name: gradient.add(params[name], alpha=self.weight_decay) for name, gradient in gradients.items()
            }
        return Estimate(loss, gradients, metrics)

    def _say_flat(self, value: float) -> None:
        self.record.skipped += 1
        if not self._told_flat:
            self._told_flat = True
            rank_zero_warn(
                f"EvolutionStrategy: all {self.population_size} members have the fitness {value:g} in batch "
                f"{self.record.batches - 1}, so it has no gradient: this step is skipped, and so are "
                "later ones like it. Give a larger sigma, or an objective with more values."
            )

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Adapt the standard deviations, once for each step of the optimizer."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.active(trainer.current_epoch):
            same_data = isinstance(trainer.strategy, ScalarExchange)
            self.algorithm.step(None if same_data else mean_over_ranks(trainer))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Inspect the module again, because it may have changed with the epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self._passes.look_again()

    def describe(self) -> dict[str, str]:
        """Return rows for the banner."""
        rank = "full-rank" if self.rank is None else f"rank-{self.rank}"
        pairs = ", mirrored" if self._in_pairs else ""
        return {
            "a step": f"{1 + self.population_size} forwards",
            "route": f"{self.population_size} members{pairs}, {rank} noise, {self.algorithm!r}",
        }

    def rule_state(self) -> dict[str, Any]:
        """Return the state of the algorithm."""
        return {"name": type(self.algorithm).__name__, "algorithm": self.algorithm.state_dict()}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the algorithm."""
        own = type(self.algorithm).__name__
        if state["name"] == own:
            self.algorithm.load_state_dict(state["algorithm"])
            return
        message = f"This checkpoint was searched by {state['name']}; {own} begins a search of its own from here."
        if self.strict_rule:
            raise MisconfigurationException(f"{message} strict_rule=True forbids it: resume with {state['name']}.")
        rank_zero_warn(message)
