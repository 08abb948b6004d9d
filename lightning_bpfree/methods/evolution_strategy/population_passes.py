"""The fitness of a population: member by member, or many members in one vectorized pass."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.func import vmap

from lightning_bpfree.core.forward_ad import plain_attention
from lightning_bpfree.core.params import Params
from lightning_bpfree.core.replay.uncounted import uncounted
from lightning_bpfree.core.step import SkipBatchError, Step
from lightning_bpfree.core.vectorizing import first_line, timed, vectorizes_badly
from lightning_bpfree.methods.evolution_strategy.population.low_rank_layers import LowRankLayers
from lightning_bpfree.methods.evolution_strategy.population.low_rank_population import Factors, LowRankPopulation
from lightning_bpfree.methods.evolution_strategy.population.population import Population

_NUMBERS = 1 << 20  # of parameters, over all members of a chunk: beyond the caches, vectorizing gains nothing
_SMALLEST = 8  # members in a chunk below which vectorizing does not pay
_ROWS = 8192  # samples over all members of a chunk where the noise is of low rank
_COMPARED = 4  # members whose losses are compared between the routes


class PopulationPasses:
    """Measures the fitness of members, in a loop or vectorized; chooses at the first batch.

    Args:
        chunk_size: members in one vectorized pass; 1 for a loop over members; ``"auto"`` chooses by the module's
            structure, so that equal runs take equal routes; ``"fastest"`` times both.
        rule: name of the rule, for messages.
    """

    def __init__(self, chunk_size: int | str, rule: str) -> None:
        self.chunk_size, self.rule = chunk_size, rule
        self.chosen: int | None = None
        self._layers: LowRankLayers | None = None
        self._said: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy, without the module."""
        return {**self.__dict__, "_layers": None}

    def restart(self) -> None:
        """Choose again at the next batch."""
        self.chosen = None
        self.look_again()

    def look_again(self) -> None:
        """Detect again which weights only their own layer uses: a training step may change with the epoch."""
        self._layers = None

    def fitness(self, step: Step, population: Population, members: Sequence[int]) -> Tensor:
        """Return the fitness of the members, shape ``(len(members),)``, in float32 on every device alike.

        Args:
            step: the step.
            population: the whole population.
            members: indices of those to measure here.
        """
        with torch.no_grad():
            if step.unvectorizable is not None and self.chosen != 1:
                self.chosen = self._refused(step.unvectorizable)
            if self.chosen is None:
                self.chosen = self._choice(step, population)
            if self.chosen > 1:
                counted = step.forward_evals
                try:
                    chunks = [members[i : i + self.chosen] for i in range(0, len(members), self.chosen)]
                    values = [self._at_once(step, population, chunk) for chunk in chunks]
                    return torch.cat(values) if values else torch.zeros(0)
                except SkipBatchError:
                    raise
                except Exception as error:
                    step.forward_evals = counted
                    values = [self._one_by_one(step, population, members)]  # which raises where the step is at fault
                    self.chosen = self._refused(first_line(error), " from here on")
                    return values[0]
            return self._one_by_one(step, population, members)

    def _refused(self, reason: str, since: str = "") -> int:
        """Return 1 (a loop) for a step that cannot be vectorized; raise if the user asked for a larger chunk."""
        if isinstance(self.chunk_size, int) and self.chunk_size > 1:
            raise MisconfigurationException(
                f"{self.rule}(chunk_size={self.chunk_size}): the training step cannot be vectorized ({reason}). "
                "Use chunk_size=1 or 'auto'."
            )
        if self.chunk_size != 1:
            rank_zero_info(f"{self.rule}: members one by one{since}, because vectorizing fails: {reason}")
        return 1

    def _one_by_one(self, step: Step, population: Population, members: Sequence[int]) -> Tensor:
        # Into one tensor: reading each loss would make a GPU wait, and small tensors that live between the large ones
        # of members leave holes in the heap, which then grows with the population.
        losses: Tensor | None = None
        for place, params in enumerate(population.in_turn(members)):
            loss = step.loss(params, recorded=False)
            if losses is None:
                losses = torch.empty(len(members), dtype=torch.float32, device=loss.device)
            losses[place] = loss
        return torch.zeros(0) if losses is None else losses

    def _at_once(self, step: Step, population: Population, members: Sequence[int]) -> Tensor:
        step.forward_evals += len(members)
        layers = self._low_rank_layers(step, population) if isinstance(population, LowRankPopulation) else None
        step.rewind()
        with plain_attention(), _no_running_statistics(step.module), warnings.catch_warnings():
            # Where vmap has no batching rule it loops inside, and warns at every call.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return self._vectorized(step, population, members, layers)

    def _vectorized(
        self, step: Step, population: Population, members: Sequence[int], layers: LowRankLayers | None
    ) -> Tensor:
        if isinstance(population, LowRankPopulation) and layers is not None:
            factors, moved = population.split(members, layers.names)
            strays: set[str] = set()
            shared, watched = layers, layers.watched(strays)

            def fitness_of(noise: dict[str, tuple[Tensor, Tensor]], params: Params) -> Tensor:
                with shared.perturbed({name: Factors(*parts) for name, parts in noise.items()}, watched):
                    return step.loss_under_transform({**params, **watched}).float()

            pairs = {name: (noise.left, noise.right) for name, noise in factors.items()}
            found = vmap(fitness_of, randomness="same")(pairs, moved)
            if not strays:
                return found
            self.look_again()  # something else uses a weight now, such as a penalty: which found no noise in it
            layers = self._low_rank_layers(step, population)
            step.rewind()
            return self._vectorized(step, population, members, layers)
        stacked = population.stack(members)
        return vmap(lambda params: step.loss_under_transform(params).float(), randomness="same")(stacked)

    def _low_rank_layers(self, step: Step, population: LowRankPopulation) -> LowRankLayers:
        if self._layers is None:
            self._layers = layers = LowRankLayers(step.slots, population.factored)
            step.rewind()
            with layers.observed(step.params) as observed:
                step.loss_under_transform(observed)
            others = sorted(population.factored - layers.names)
            if others and others != self._said:
                self._said = others
                rank_zero_info(
                    f"{self.rule}: a matrix of noise for each member, because not only a standard layer uses these "
                    f"weights: {', '.join(others)}."
                )
        return self._layers

    @uncounted()
    def _choice(self, step: Step, population: Population) -> int:
        if isinstance(self.chunk_size, int):
            if self.chunk_size > 1 and not self._asked_for_agrees(step, population):
                raise MisconfigurationException(
                    f"{self.rule}(chunk_size={self.chunk_size}): vectorized members have different losses than "
                    "single ones, because the training step draws noise outside of torch, or keeps state between "
                    "evaluations. Use chunk_size=1."
                )
            return self.chunk_size
        by_clock = self.chunk_size == "fastest"
        if by_clock and torch.are_deterministic_algorithms_enabled():
            rank_zero_info(
                f"{self.rule}: torch requires deterministic algorithms, so chunk_size='fastest' acts as 'auto'."
            )
            by_clock = False
        chunk = min(population.size, _expected_chunk(step, population, by_clock))
        if chunk < _SMALLEST and not by_clock:
            return 1
        counted = step.forward_evals
        try:
            if not self._agrees(step, population, chunk):
                rank_zero_info(f"{self.rule}: members one by one, because vectorized members have different losses.")
                return 1
            return self._faster(step, population, chunk) if by_clock else chunk
        except Exception as error:  # whatever it is, the loop is there
            rank_zero_info(f"{self.rule}: members one by one, because vectorizing fails: {first_line(error)}")
            return 1
        finally:
            step.forward_evals = counted  # trials at the first batch are no part of the rule's cost

    def _asked_for_agrees(self, step: Step, population: Population) -> bool:
        assert isinstance(self.chunk_size, int)
        try:
            return self._agrees(step, population, min(self.chunk_size, population.size))
        except SkipBatchError:
            raise
        except Exception as error:
            self._one_by_one(step, population, range(1))  # which raises where the step is at fault
            self._refused(first_line(error))
            raise

    def _agrees(self, step: Step, population: Population, chunk: int) -> bool:
        """Whether vectorized losses differ between members as they do one by one, so that no noise is missing."""
        counted, members = step.forward_evals, range(min(chunk, _COMPARED))
        vectorized = self._at_once(step, population, range(chunk))[: len(members)].double()
        alone = self._one_by_one(step, population, members).to(vectorized.device).double()
        step.forward_evals = counted
        # Under autocast, weights and noise are rounded together in a loop, and apart where the noise is of low rank.
        kind = vectorized.device.type
        digits = torch.finfo(torch.get_autocast_dtype(kind)).eps if torch.is_autocast_enabled(kind) else 1e-5
        rounding = digits * alone.abs().nan_to_num(posinf=0.0, neginf=0.0).max()
        spread = (alone - alone[0]).abs().nan_to_num(posinf=0.0, neginf=0.0).max()
        return torch.allclose(vectorized, alone, rtol=0, atol=float(0.1 * spread + rounding), equal_nan=True)

    def _faster(self, step: Step, population: Population, chunk: int) -> int:
        device = next(iter(step.params.values())).device
        vectorized, _ = timed(lambda: self._at_once(step, population, range(chunk)), device, 3)
        alone, _ = timed(lambda: self._one_by_one(step, population, [0]), device, 3)
        looped = chunk * alone
        chosen = chunk if vectorized < looped else 1
        rank_zero_info(
            f"{self.rule}: {chunk} members take {vectorized:.3g} s in one pass, {looped:.3g} s one by one: "
            f"chunk_size={chosen} from here on."
        )
        return chosen


@contextlib.contextmanager
def _no_running_statistics(module: nn.Module) -> Iterator[None]:
    """Keep BatchNorm in training from moving statistics that members share; it computes with those of the batch."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _expected_chunk(step: Step, population: Population, by_clock: bool) -> int:
    numbers = sum(tensor.numel() for tensor in step.params.values())
    if isinstance(population, LowRankPopulation):
        return max(_SMALLEST, _ROWS // max(1, _rows_of(step.args)))
    if vectorizes_badly(step.module) and not by_clock:
        return 1
    return max(_SMALLEST if by_clock else 1, min(_NUMBERS // max(1, numbers), population.size))


def _rows_of(args: object) -> int:
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors else 1
