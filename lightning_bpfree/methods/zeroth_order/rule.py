"""Zeroth-order training: random finite differences of the loss, with only forward passes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_bpfree.core.arguments import Patterns, PositiveFloat, PositiveInt, checked
from lightning_bpfree.core.combination import Combination
from lightning_bpfree.core.directions import Directions, Distribution
from lightning_bpfree.core.finite_differences import LossFunction, difference_quotients
from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.core.step import Estimate, Step
from lightning_bpfree.training.flat_objective import FlatObjective
from lightning_bpfree.training.precision import computed_in, smallest_sigma
from lightning_bpfree.training.training_rule import TrainingRule

Scheme = Literal["central", "forward"]


def default_sigma(dtype: torch.dtype) -> float:
    """Return 1e-3, or 1e-2 for half-precision types."""
    return 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3


@checked
def zeroth_order_gradient(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    *,
    num_directions: PositiveInt = 1,
    sigma: PositiveFloat = 1e-3,
    scheme: Scheme = "central",
    directions: Distribution = "gaussian",
    orthogonal: bool = False,
    normalize: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Params]:
    """Return the loss and an estimate of its gradient, from evaluations of the loss alone.

    The functional form of :class:`ZerothOrder`, with the same arguments, for plain loops and Fabric.

    Examples:
        >>> loss, grads = zeroth_order_gradient(
        ...     lambda p: (p["w"] ** 2).sum(), {"w": torch.ones(2)}, num_directions=2, orthogonal=True
        ... )
        >>> [round(float(g), 2) for g in grads["w"]]
        [2.0, 2.0]
    """
    drawn = Directions(params, num_directions, seed, directions)
    with torch.no_grad():
        loss = loss_fn(dict(params))
    base = loss if scheme == "forward" else None
    combination = Combination(drawn, orthogonal, normalize)
    slopes = difference_quotients(loss_fn, params, drawn, sigma, base_loss=base, combination=combination)
    return loss, combination.gradients(slopes)(None)


class ZerothOrder(TrainingRule):
    """Trains with random finite differences of the loss (Stein's identity, SPSA, MeZO, BAFFLE's estimator).

    The estimate ``mean_k c_k v_k``, with ``c_k`` the difference quotient of the loss along the random direction
    ``v_k``, is unbiased for the gradient of the loss smoothed over N(0, sigma^2). No derivative is needed, so the
    training step may return an accuracy, or call NumPy or a simulator. No activation is stored: at any depth, peak
    memory is that of inference plus one copy of the batch and two of the trained parameters (the perturbed ones and the
    estimate).

    Cost: ``1 + 2 K`` forward passes per batch (central) or ``1 + K`` (forward). The error of the estimate grows with
    the number of trained parameters ``d``: the cosine to the gradient is about ``sqrt(K / (K + d + 1))``.

    Args:
        num_directions: ``K``, at least 1.
        sigma: size of the perturbation, in units of the parameters, > 0; None takes 1e-3, or 1e-2 in half precision.
        scheme: ``"central"`` (error of order sigma^2) or ``"forward"`` (half the evaluations, error of order sigma).
        directions: ``"gaussian"`` or ``"rademacher"`` (random signs: SPSA).
        orthogonal: orthonormalize the ``K`` directions; helps if ``K`` is not small compared with ``d``.
        normalize: scale the directions to length sqrt(d).
        params: shell-style patterns of the parameters to train; None for all.
        **settings: see :class:`TrainingRule`.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> rule = ZerothOrder(num_directions=8, sigma=1e-3, scheme="forward")
        >>> rule.describe()["a step"]
        '9 forwards'

    References:
        J. C. Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation",
        1992. S. Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", 2023, arXiv 2305.17333.
        H. Feng et al., "Does Federated Learning Really Need Backpropagation?", 2023, arXiv 2301.12195.
    """

    citation: ClassVar[str] = (
        "@article{malladi2023mezo, title={Fine-Tuning Language Models with Just Forward Passes}, author={Malladi, "
        "Sadhika and others}, journal={arXiv preprint arXiv:2305.17333}, year={2023}}"
    )
    exchanges_scalars: bool = True
    backpropagates: ClassVar[bool] = False

    @checked
    def __init__(
        self,
        num_directions: PositiveInt = 1,
        sigma: PositiveFloat | None = None,
        scheme: Scheme = "central",
        directions: Distribution = "gaussian",
        orthogonal: bool = False,
        normalize: bool = False,
        *,
        params: Patterns | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params=params, **settings)
        self.num_directions, self.sigma, self.scheme, self.directions = num_directions, sigma, scheme, directions
        self.orthogonal, self.normalize = orthogonal, normalize
        self._default_sigma = 1e-3
        self._flat = FlatObjective(
            type(self).__name__, "Give a larger sigma or more directions, or a loss with more values."
        )

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Choose sigma for the precision of the computation, and refuse one below the rounding error."""
        self._choose_sigma(computed_in(trainer, module))

    def computes_in(self, dtype: torch.dtype) -> None:
        """Choose sigma for the detected precision, for example of autocast inside the training step."""
        before = self._sigma_used
        self._choose_sigma(dtype)
        if self._sigma_used != before:
            rank_zero_info(f"ZerothOrder: the training step computes in {dtype}: sigma={self._sigma_used:g} from here.")

    def _choose_sigma(self, dtype: torch.dtype) -> None:
        if self.sigma is None:
            self._default_sigma = default_sigma(dtype)
        elif self.sigma < smallest_sigma(dtype):
            raise MisconfigurationException(
                f"ZerothOrder(sigma={self.sigma:g}) is lost in the rounding of {dtype}: give at least "
                f"sigma={smallest_sigma(dtype):.1g}, leave sigma=None, or train in precision='32-true'."
            )

    @property
    def _sigma_used(self) -> float:
        return self._default_sigma if self.sigma is None else self.sigma

    def estimate(self, step: Step) -> Estimate:
        """Return the loss and the combination of directions by their difference quotients."""
        params = step.params
        directions = Directions(params, self.num_directions, step.seed, self.directions)
        with torch.no_grad():
            loss = step.loss()
        base = loss if self.scheme == "forward" else None
        combination = Combination(directions, self.orthogonal, self.normalize, exchanged=step.exchange is not None)
        quotients = partial(difference_quotients, step.loss, params, directions, self._sigma_used, base_loss=base)
        slopes = step.measure(self.num_directions, lambda ks: quotients(ks=ks, combination=combination))
        self._flat.look(slopes, self.record.batches - 1)
        return Estimate(loss, combination.gradients(slopes))

    def describe(self) -> dict[str, str]:
        """Return rows for the banner."""
        forwards = 1 + self.num_directions * (2 if self.scheme == "central" else 1)
        shape = (
            f"{self.num_directions} {self.directions} directions, sigma {self._sigma_used:g}, {self.scheme} differences"
        )
        return {"a step": f"{forwards} forwards", "route": shape}
