"""Noise schedules: the nodes of a diffusion model's probability-flow ODE, and the network's time input at each."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeInt, OpenFraction, PositiveFloat, checked, shown

Spacing = Literal["leading", "trailing", "linspace", "log_rho"]


class Node(NamedTuple):
    """One point of the ODE ``dy/drho = f``, with numbers in double precision.

    Attributes:
        rho: the variable of integration; falls from noise to data.
        time: the network's time input, in its own units (usually 0 to 1000).
        scale: of the network's input, ``x = scale * y``.
        alpha: of the data, in ``x = alpha * x0 + sigma * noise``.
        sigma: of the noise.
    """

    rho: float
    time: float
    scale: float
    alpha: float
    sigma: float


class Schedule(Protocol):
    """The interface of a noise schedule for solvers."""

    predictions: ClassVar[tuple[str, ...]]
    """What a network may predict under this schedule."""

    def node(self, rho: float) -> Node:
        """Return the point at ``rho``; the time between the points that the schedule knows is interpolated."""

    def grid(self, num_steps: int) -> list[Node]:
        """Return the nodes of a solve from noise to data in that many steps."""


class VariancePreserving:
    """Schedules with ``alpha^2 + sigma^2 = 1``, solved in ``y = x / alpha`` and ``rho = sigma / alpha``.

    In these variables the linear drift is gone (an exponential integrator) and ``dy/drho`` is the predicted noise.
    """

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction", "score")

    def time(self, rho: float) -> float:
        """Return the network's time at ``rho``."""
        raise NotImplementedError

    def node(self, rho: float) -> Node:
        """Return the point at ``rho``, at least 0."""
        return self._node(rho, self.time(rho))

    @staticmethod
    def _node(rho: float, time: float) -> Node:
        alpha = 1.0 / math.sqrt(1.0 + rho * rho)
        return Node(rho, time, alpha, alpha, rho * alpha)


class LinearVP(VariancePreserving):
    """The continuous schedule whose noise rate rises linearly from ``beta_min`` to ``beta_max``, over times in (0, 1].

    Args:
        beta_min: rate at time 0, above 0.
        beta_max: rate at time 1, above ``beta_min``.
        time_scale: the network's time input is ``time_scale * t``; above 0.
        last_time: time at which the solver ends, in (0, 1).

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> nodes = LinearVP().grid(4)
        >>> len(nodes), round(nodes[0].sigma, 4)
        (5, 1.0)

    References:
        Y. Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
        arXiv 2011.13456.
    """

    @checked
    def __init__(
        self,
        beta_min: PositiveFloat = 0.1,
        beta_max: PositiveFloat = 20.0,
        *,
        time_scale: PositiveFloat = 1000.0,
        last_time: OpenFraction = 1e-3,
    ) -> None:
        if not beta_min < beta_max:
            raise ValueError(f"LinearVP: beta_min={beta_min}: give a rate below beta_max={beta_max}.")
        self.beta_min, self.beta_max, self.time_scale, self.last_time = beta_min, beta_max, time_scale, last_time

    def rho(self, t: float) -> float:
        """Return the noise-to-signal ratio at time ``t``, in [0, 1]."""
        log_alpha = -0.25 * (self.beta_max - self.beta_min) * t * t - 0.5 * self.beta_min * t
        return math.sqrt(math.expm1(-2.0 * log_alpha))

    def time(self, rho: float) -> float:
        """Return the network's time at ``rho``."""
        # The root of a quadratic in t, in the form that loses no digits near 0.
        c, slope = math.log1p(rho * rho), self.beta_max - self.beta_min
        return self.time_scale * 2.0 * c / (self.beta_min + math.sqrt(self.beta_min**2 + 2.0 * slope * c))

    def grid(self, num_steps: int) -> list[Node]:
        """Return ``num_steps + 1`` nodes, evenly spaced in log rho."""
        check_steps(num_steps)
        return [self.node(rho) for rho in _geometric(self.rho(1.0), self.rho(self.last_time), num_steps)]


class DiscreteVP(VariancePreserving):
    """The schedule of a network that was trained at the times 0 to T - 1, as in diffusers.

    Args:
        alphas_cumprod: products of ``1 - beta``, shape (T,), decreasing, in (0, 1).
        spacing: times of the nodes: ``"leading"``, ``"trailing"`` and ``"linspace"`` are those of diffusers'
            DDIMScheduler; ``"log_rho"`` is evenly spaced in the logarithm of the noise-to-signal ratio, down to its
            minimum.
        steps_offset: added to the times of ``"leading"``, at least 0.
        end_at_zero: whether the last step ends at data without noise, or at the noise of time 0.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> schedule = DiscreteVP.from_betas(0.00085, 0.012, scaled=True)
        >>> [round(node.time) for node in schedule.grid(4)]
        [750, 500, 250, 0, 0]
    """

    @checked
    def __init__(
        self,
        alphas_cumprod: Tensor | Sequence[float],
        *,
        spacing: Spacing = "leading",
        steps_offset: NonNegativeInt = 0,
        end_at_zero: bool = True,
    ) -> None:
        values = torch.as_tensor(alphas_cumprod, dtype=torch.float64).flatten()
        if len(values) < 2 or not bool(((values > 0) & (values < 1)).all()) or not bool((values.diff() < 0).all()):
            raise ValueError(
                f"DiscreteVP: alphas_cumprod={shown(alphas_cumprod)}: give two values or more that fall, within 0 and "
                "1, both excluded: the noise-to-signal ratio is infinite or undefined otherwise (diffusers' "
                "rescale_betas_zero_snr=True makes the last value 0)."
            )
        if steps_offset >= len(values):
            raise ValueError(f"DiscreteVP: steps_offset={steps_offset}: give 0 to {len(values) - 1}.")
        self.rhos: list[float] = ((1 - values) / values).sqrt().tolist()
        self._logs = [math.log(rho) for rho in self.rhos]
        self.spacing, self.steps_offset, self.end_at_zero = spacing, steps_offset, end_at_zero

    @classmethod
    def from_betas(
        cls, first: float = 1e-4, last: float = 0.02, num_times: int = 1000, *, scaled: bool = False
    ) -> DiscreteVP:
        """Return the schedule with ``beta``, or its square root if ``scaled``, evenly spaced between two values."""
        power = 2.0 if scaled else 1.0
        betas = torch.linspace(first ** (1 / power), last ** (1 / power), num_times, dtype=torch.float64) ** power
        return cls((1 - betas).cumprod(0))

    def time(self, rho: float) -> float:
        """Return the time at ``rho``, linear in log rho between whole times and clamped to the first and the last."""
        last = len(self.rhos) - 1
        if rho <= self.rhos[0]:
            return 0.0
        if rho >= self.rhos[last]:
            return float(last)
        log = math.log(rho)
        above = bisect.bisect_right(self._logs, log)
        low, high = self._logs[above - 1], self._logs[min(above, last)]
        return float(above - 1) if high == low else above - 1 + (log - low) / (high - low)

    def grid(self, num_steps: int) -> list[Node]:
        """Return the nodes; one fewer if the last step would have length zero."""
        check_steps(num_steps)
        if self.spacing == "log_rho":
            return [self.node(rho) for rho in _geometric(self.rhos[-1], self.rhos[0], num_steps)]
        nodes = [self._node(self.rhos[t], float(t)) for t in self._times(num_steps)]
        last = self._node(0.0 if self.end_at_zero else self.rhos[0], 0.0)
        return [*nodes, last] if last.rho < nodes[-1].rho else nodes

    def _times(self, num_steps: int) -> list[int]:
        total = len(self.rhos)
        if num_steps > total:
            raise ValueError(f"num_steps={num_steps}: the schedule has {total} times; give at most as many.")
        if self.spacing == "leading":
            return [min(i * (total // num_steps) + self.steps_offset, total - 1) for i in reversed(range(num_steps))]
        if self.spacing == "trailing":
            return [round(total * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]
        return [round(i * (total - 1) / max(num_steps - 1, 1)) for i in reversed(range(num_steps))]


class FlowMatching:
    """Straight paths from data to noise, ``x = (1 - s) x0 + s noise``, whose network predicts ``noise - x0``.

    The ODE ``dx/ds`` is that prediction and has no stiff part, so ``y = x`` and ``rho = s``.

    Args:
        shift: moves the nodes toward noise, above 0; 1 keeps even spacing. Each node is shifted once.
        mu: exponent of diffusers' dynamic shift, instead of ``shift``; None for none.
        time_scale: the network's time input is ``time_scale * s``; above 0.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> [node.rho for node in FlowMatching().grid(4)]
        [1.0, 0.75, 0.5, 0.25, 0.0]

    References:
        Y. Lipman et al., "Flow Matching for Generative Modeling", 2023, arXiv 2210.02747.
    """

    predictions: ClassVar[tuple[str, ...]] = ("flow_prediction",)

    @checked
    def __init__(
        self, shift: PositiveFloat = 1.0, mu: float | None = None, *, time_scale: PositiveFloat = 1000.0
    ) -> None:
        self.shift = shift if mu is None else math.exp(mu)
        self.time_scale = time_scale

    def node(self, rho: float) -> Node:
        """Return the point at ``rho``, in [0, 1]."""
        return Node(rho, self.time_scale * rho, 1.0, 1.0 - rho, rho)

    def grid(self, num_steps: int) -> list[Node]:
        """Return ``num_steps + 1`` nodes from 1 to 0."""
        check_steps(num_steps)
        even = [1.0 - i / num_steps for i in range(num_steps)]
        return [*(self.node(self.shift * s / (1.0 + (self.shift - 1.0) * s)) for s in even), self.node(0.0)]


def check_steps(num_steps: int) -> None:
    """Raise ValueError unless there is at least one step."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: a solve has at least 1 step.")


def _geometric(first: float, last: float, num_steps: int) -> list[float]:
    ratio = math.log(last / first) / num_steps
    return [first, *(first * math.exp(ratio * i) for i in range(1, num_steps)), last]
