"""Sample-level differential privacy: clipped loss differences, Gaussian noise, and the resulting guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import (
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    checked,
)
from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.local_loss import own_randomness
from lightning_bpfree.federated.secret_numbers import SecretNumbers
from lightning_bpfree.federated.settings import noise_seed


def _accounting() -> Any:
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Privacy needs dp-accounting: pip install "lightning-bpfree[federated]"') from error
    return dp_accounting


class Privacy:
    """The privacy guarantee of a run for every training sample, and the noise that it requires.

    The ``K`` loss differences of a sample are scaled down to a norm of at most ``clip``. A client sums them over the
    samples that it draws in the round, each with probability ``rate``, and adds Gaussian noise. The noise of all
    clients together has the standard deviation ``multiplier * clip``. Only a client sees its own sum without noise;
    the server and readers of its weights do not. Neighboring data sets differ by adding or removing a sample.

    Args:
        epsilon: privacy budget of the whole run, > 0.
        delta: delta of the whole run, in (0, 1); below one over the number of samples.
        clip: bound on the norm of a sample's ``K`` numbers, in units of the loss; a good value is near the median norm.
        rate: probability of a sample in a round, in (0, 1].
        seed: seed of noise and draws, for reproducible simulations, which have no guarantee; None takes a key from the
            operating system for every client and round.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> Privacy(epsilon=8.0, delta=1e-5, clip=0.01).rate
        1.0

    References:
        I. Mironov, "Rényi Differential Privacy", 2017, arXiv 1702.07476. Accounting: dp-accounting of Google.
        X. Tang et al., "Private Fine-tuning of Large Language Models with Zeroth-order Optimization", 2024,
        arXiv 2401.04343.
    """

    @checked
    def __init__(
        self,
        epsilon: PositiveFloat = 8.0,
        delta: OpenFraction = 1e-5,
        clip: PositiveFloat = 0.001,
        rate: PositiveFraction = 1.0,
        seed: NonNegativeInt | None = None,
    ) -> None:
        self.epsilon, self.delta, self.clip, self.rate, self.seed = epsilon, delta, clip, rate, seed

    def to_plain(self) -> dict[str, Any]:
        """Return the settings as numbers."""
        return dict(vars(self))

    def multiplier(self, rounds: PositiveInt) -> float:
        """Return the noise that ``rounds`` rounds require, in units of ``clip``."""
        accounting = _accounting()

        def event_of(multiplier: float) -> Any:
            return self._events([multiplier] * rounds)

        found = accounting.calibrate_dp_mechanism(
            lambda: accounting.rdp.RdpAccountant(),
            event_of,
            self.epsilon,
            self.delta,
            accounting.LowerEndpointAndGuess(0.01, 10.0),
            tol=1e-3,
        )
        return float(found)

    def spent(self, multipliers: Sequence[float]) -> float:
        """Return epsilon after the given rounds.

        Args:
            multipliers: the noise of each round, in units of ``clip``: less if clients dropped out.
        """
        if not multipliers:
            return 0.0
        if min(multipliers) <= 0:
            return math.inf
        accountant = _accounting().rdp.RdpAccountant()
        accountant.compose(self._events(multipliers))
        return float(accountant.get_epsilon(self.delta))

    def _events(self, multipliers: Sequence[float]) -> Any:
        events = _accounting()
        builder = events.DpEventBuilder()
        for multiplier in sorted(set(multipliers)):
            event = events.GaussianDpEvent(multiplier)
            if self.rate < 1:
                event = events.PoissonSampledDpEvent(self.rate, event)
            builder.compose(event, sum(1 for other in multipliers if other == multiplier))
        return builder.build()

    def source(self, *numbers: int) -> SecretNumbers:
        """Return a source of noise and draws: secret, or determined by the seed and some numbers."""
        return SecretNumbers() if self.seed is None else SecretNumbers.of_seed(self.seed, *numbers)


class PrivateClient(BaffleClient):
    """A client whose numbers are private sums: see :class:`Privacy`.

    Args:
        module: see :class:`BaffleClient`; its training step must return the mean loss over the samples of a batch,
            and must be one that torch.func can vectorize.
        data: the client's samples.
        settings: the federation's settings, with one local step.
        privacy: the guarantee.
        share: standard deviation of this client's noise, in units of ``clip``.
        measure_memory: see :class:`BaffleClient`.
    """

    def __init__(self, *given: Any, privacy: Privacy, share: float, measure_memory: bool = False) -> None:
        super().__init__(*given, measure_memory=measure_memory)
        if self.settings.local_steps > 1:
            raise ValueError(
                f"PrivateClient: local_steps={self.settings.local_steps}: a sample counts once in a round; use 1."
            )
        self.privacy, self.share = privacy, share

    def measured(self, seed: int, client: int) -> tuple[Tensor, float, float]:
        """Return private differences ``(1, K)``, the expected number of samples, and the forward passes."""
        privacy, source = self.privacy, self.privacy.source(seed, self.number)
        chances = source.uniforms(len(self.data)).tolist()
        total = torch.zeros(self.settings.num_directions, dtype=torch.float64)
        passes = 0.0
        with own_randomness(noise_seed(seed, self.number, 0), self.loss.module.device), torch.no_grad():
            for batch, _ in self.data.drawn(chances, privacy.rate):
                rows = self._per_sample(batch, seed, client)  # (K, B)
                norms = rows.norm(dim=0).clamp_min(1e-300)
                total += (rows * (privacy.clip / norms).clamp(max=1.0)).sum(1)
                passes += self.settings.forward_passes
        noise = torch.from_numpy(source.normals(len(total))) * (self.share * privacy.clip)
        expected = privacy.rate * len(self.data)
        return ((total + noise) / expected).unsqueeze(0), expected, passes

    def _per_sample(self, batch: Any, seed: int, client: int) -> Tensor:
        """Return the differences of every sample, float64 of shape ``(K, B)``."""
        params, sigma = self.loss.params, self.settings.sigma
        directions = self.settings.drawn(params, seed, 0, client)
        rows = []
        for start in range(0, len(directions), self.settings.chunk_size):
            ks = range(start, min(start + self.settings.chunk_size, len(directions)))
            stack = directions.stack(ks)
            sides = [sigma] if self.settings.scheme == "forward" else [sigma, -sigma]
            moved = [{n: p + side * stack[n] for n, p in params.items()} for side in sides]
            losses = [self.loss.per_sample(batch, own).double() for own in moved]
            rows.append(losses[0] if len(losses) == 1 else (losses[0] - losses[1]) / 2)
        found = torch.cat(rows)
        if self.settings.scheme == "forward":
            found = found - self.loss.per_sample(batch, {n: p.unsqueeze(0) for n, p in params.items()}).double()
        return found.cpu()
