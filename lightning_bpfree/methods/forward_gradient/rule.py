"""Forward gradients: directional derivatives along random directions, by forward-mode automatic differentiation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_bpfree.core.arguments import Patterns, PositiveInt, checked
from lightning_bpfree.core.blocks import Blocks
from lightning_bpfree.core.combination import Combination
from lightning_bpfree.core.directions import Directions, Distribution
from lightning_bpfree.core.forward_ad import (
    LossFunction,
    NoForwardDerivativeError,
    compiled_parts,
    directional_derivative,
    directional_derivatives,
    failing_layer,
    supported_kernels,
    unsupported_layers,
)
from lightning_bpfree.core.labels import LabelsOf
from lightning_bpfree.core.params import ParameterSlots, Params, widen
from lightning_bpfree.core.step import Estimate, SkipBatchError, Step
from lightning_bpfree.core.vectorizing import ChunkSize, first_line
from lightning_bpfree.methods.forward_gradient.block_passes import DUAL_COST
from lightning_bpfree.methods.forward_gradient.local_guesses import LocalGuesses, local_guesses
from lightning_bpfree.methods.forward_gradient.local_loss import LocalLoss
from lightning_bpfree.methods.forward_gradient.projection import Scope, Space
from lightning_bpfree.methods.forward_gradient.slopes import along_many, along_one, chosen_chunk
from lightning_bpfree.training.checks import check_made
from lightning_bpfree.training.flat_objective import FlatObjective
from lightning_bpfree.training.ranks import mean_over_ranks
from lightning_bpfree.training.refusal import refusing
from lightning_bpfree.training.training_rule import TrainingRule


@checked
def forward_gradient(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    *,
    num_directions: PositiveInt = 1,
    directions: Distribution = "gaussian",
    orthogonal: bool = False,
    normalize: bool = False,
    chunk_size: PositiveInt = 1,
    seed: int = 0,
) -> tuple[Tensor, Params]:
    """Return the loss and an unbiased estimate of its gradient, without a backward pass.

    The functional form of :class:`ForwardGradient`, with the same arguments, for plain loops and Fabric.

    Examples:
        >>> loss, grads = forward_gradient(
        ...     lambda p: (p["w"] ** 2).sum(), {"w": torch.ones(2)}, num_directions=2, orthogonal=True
        ... )
        >>> [round(float(g), 4) for g in grads["w"]]
        [2.0, 2.0]
    """
    drawn = Directions(params, num_directions, seed, directions)
    combination, parts = Combination(drawn, orthogonal, normalize), []
    for ks in _chunks(range(num_directions), chunk_size):
        alone = chunk_size == 1
        chunk = drawn[ks[0]] if alone else drawn.stack(ks)
        loss, slopes = (directional_derivative if alone else directional_derivatives)(loss_fn, params, chunk)
        parts.append(widen(slopes.reshape(-1)))
        combination.add(slopes, chunk)
    return loss, combination.gradients(torch.cat(parts))(None)


def _chunks(ks: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ks[start : start + size] for start in range(0, len(ks), size)]


class ForwardGradient(TrainingRule):
    """Trains with forward gradients: one forward pass of dual numbers per direction, no backward pass, no graph.

    The estimate ``mean_k (g . v_k) v_k`` over random directions ``v_k`` is unbiased for the gradient ``g``. Its error
    grows with the number of trained parameters ``d``: the cosine to the gradient is about ``sqrt(K / (K + d + 1))``.

    Cost: about 3 forward passes per direction in a loop (the cost of a whole backprop step), or 2 per direction in a
    vectorized chunk, which holds ``chunk_size`` copies of parameters and activations.

    Attention falls back to its math kernel, and LSTMs on the CPU do not use oneDNN, since the fast kernels have no
    forward derivative. ``detach`` and ``no_grad`` inside the training step stop tangents as they stop gradients.

    Args:
        num_directions: ``K``, at least 1.
        directions: ``"gaussian"`` or ``"rademacher"`` (random signs; variance d - 1 instead of d + 1).
        orthogonal: orthonormalize the ``K`` directions; cosine ``sqrt(K / d)``, and exact for ``K = d``.
        normalize: scale the directions to length sqrt(d): variance d - 1.
        chunk_size: directions per vectorized pass; 1 is a loop. ``"auto"`` takes up to 8, or the loop for modules with
            convolutions or recurrent layers, where it is faster. ``"fastest"`` times both at the first batch and
            keeps the faster one, also across a resume; two runs may then differ in rounding, so it is treated as
            ``"auto"`` under ``Trainer(deterministic=True)``.
        guess: a :class:`LocalLoss` whose gradient is the direction, instead of random ones: the estimate is then the
            projection ``(<g, q> / |q|^2) q`` of the target onto the guess; zero for a guess of zero.
        target: ``"global"``, the gradient of the user's loss; ``"local"``, that of the guess's own local losses (or of
            linear heads, with random directions); or that of other local losses, a :class:`LocalLoss`.
        space: space of guess and projection. ``"weights"``: the parameters of the blocks. ``"activations"``: the
            outputs of the blocks, per sample; backprop then carries the estimate to the parameters inside each block.
        scope: what one dual pass projects together: ``"network"``, a ``"block"`` or a ``"tensor"`` of parameters. None:
            a block, or the whole network if it is not cut.
        blocks: how the network is cut, see :func:`lightning_bpfree.core.blocks.cut`; omit it with a LocalLoss, which
            has its own. Layers after the last block get their exact gradient.
        network: the network in the module, see :class:`LocalLoss`.
        labels: extracts the labels from a batch, see :class:`LocalLoss`.
        params: shell-style patterns of the parameters to train; None for all.
        **settings: see :class:`TrainingRule`.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> ForwardGradient(num_directions=4, chunk_size=1).describe()["a step"]
        '4 dual forwards (12 forwards)'
        >>> ForwardGradient(guess=LocalLoss("mlp"), scope="network").describe()["a step"]
        '1 dual forward beside 3 plain (6 forwards)'

    References:
        A. G. Baydin, B. A. Pearlmutter, D. Syme, F. Wood, P. Torr, "Gradients without Backpropagation", 2022, arXiv
        2202.08587. L. Fournier et al., "Can Forward Gradient Match Backpropagation?", 2023, arXiv 2306.06968.
    """

    citation: ClassVar[str] = (
        "@article{baydin2022gradients, title={Gradients without Backpropagation}, author={Baydin, Atilim Gunes and "
        "Pearlmutter, Barak A. and Syme, Don and Wood, Frank and Torr, Philip}, journal={arXiv preprint "
        "arXiv:2202.08587}, year={2022}}"
    )
    exchanges_scalars: bool = True
    backpropagates: ClassVar[bool] = False
    differentiates_forward: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        num_directions: PositiveInt = 1,
        directions: Distribution = "gaussian",
        orthogonal: bool = False,
        normalize: bool = False,
        chunk_size: ChunkSize = "auto",
        guess: LocalLoss | None = None,
        target: Literal["global", "local"] | LocalLoss = "global",
        space: Space = "weights",
        scope: Scope | None = None,
        blocks: Blocks | None = None,
        network: str | None = None,
        labels: LabelsOf | None = None,
        *,
        params: Patterns | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params=params, **settings)
        self.num_directions, self.directions = num_directions, directions
        self.orthogonal, self.normalize, self.chunk_size = orthogonal, normalize, chunk_size
        self.guess, self.target, self.space, self.scope = guess, target, space, scope
        self.blocks, self.network, self.labels = blocks, network, labels
        self._local_guesses: LocalGuesses | None = None
        self._chunk_found: int | None = None  # by a trial at the first batch
        self._flat = FlatObjective(
            type(self).__name__,
            "Look for dead units, rounding or a clamp in the training step. ZerothOrder(sigma=...) and "
            "EvolutionStrategy() use finite perturbations and need no slope.",
        )
        self.resolve()

    def resolve(self) -> None:
        """Set up blocks and guesses from the arguments; heads keep their learned parameters."""
        super().resolve()
        before = self._local_guesses
        self._local_guesses = made = local_guesses(
            self.guess,
            self.target,
            self.space,
            self.scope,
            self.blocks,
            self.network,
            self.labels,
            self.num_directions,
            self.directions,
        )
        self.exchanges_scalars = made is None  # guesses and exact gradients differ between ranks
        self.cuts_graphs = made is not None
        if made is None:
            return
        if self.orthogonal or self.normalize or self.chunk_size not in ("auto", 1):
            raise ValueError(
                f"ForwardGradient: orthogonal={self.orthogonal}, normalize={self.normalize}, "
                f"chunk_size={self.chunk_size!r} apply to random directions of all weights together: leave them out "
                "beside guess, target, space, scope, blocks."
            )
        if before is not None:
            made.go_on_with(before)

    def start_over(self) -> None:
        """Start with new heads, and choose the chunk again."""
        self._chunk_found = self._local_guesses = None
        self.resolve()

    @property
    def _chunk_used(self) -> int | None:
        if self.num_directions == 1:
            return 1
        if isinstance(self.chunk_size, int):
            return min(self.chunk_size, self.num_directions)
        return self._chunk_found

    def _one_by_one(self, reason: str) -> None:
        """Loop from here on; raise if the user asked for vectorized passes."""
        if self._chunk_used == 1:
            return
        if isinstance(self.chunk_size, int):
            raise MisconfigurationException(
                f"ForwardGradient(chunk_size={self.chunk_size}): the training step cannot be vectorized ({reason}). "
                "Use chunk_size=1 or 'auto'."
            )
        if self._chunk_found is not None:  # otherwise the first batch reports it
            rank_zero_info(f"ForwardGradient: directions one by one from here on, since vectorizing fails: {reason}")
        self._chunk_found = 1

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Refuse modules that fail, or silently give wrong results, under forward-mode AD."""
        compiled = compiled_parts(module)
        if compiled or getattr(module, "_compiler_ctx", None) is not None:
            raise MisconfigurationException(
                f"ForwardGradient cannot train through torch.compile, which may drop tangents without an error: "
                f"{', '.join(compiled) or type(module).__name__} is compiled. Train the module as it was before "
                "torch.compile (module._orig_mod of a compiled part), or use ZerothOrder()."
            )
        if self._local_guesses is not None:
            check_made(type(self).__name__, module)
            with refusing(type(self).__name__, ValueError):
                self._local_guesses.check(module, slots)
            if not self._local_guesses.uses_tangents:
                return
        for layer, cure in unsupported_layers(module, [slot.parameter for slot in slots.trainable()]):
            raise MisconfigurationException(
                f"ForwardGradient: {layer} has no forward-mode derivative in torch. Cure: {cure}, leave it out by "
                "params=..., or use ZerothOrder()."
            )

    def estimate(self, step: Step) -> Estimate:
        """Return the loss and the combination of directions by their slopes, or the projection onto the guess."""
        try:
            with refusing(type(self).__name__), supported_kernels(step.module):
                return (
                    self._combined(step)
                    if self._local_guesses is None
                    else self._local_guesses.estimate(step, self.record.seed or 0)
                )
        except NoForwardDerivativeError as error:
            raise MisconfigurationException(f"ForwardGradient: {error}") from error

    def _combined(self, step: Step) -> Estimate:
        params = step.params
        directions = Directions(params, self.num_directions, step.seed, self.directions)
        combination = Combination(directions, self.orthogonal, self.normalize, exchanged=step.exchange is not None)
        with torch.set_grad_enabled(False):
            if step.unvectorizable is not None:
                self._one_by_one(step.unvectorizable)
            if self._chunk_used is None:
                self._chunk_found = chosen_chunk(step, params, directions, self.chunk_size == "fastest")
            slopes = step.measure(self.num_directions, partial(self._slopes, step, params, combination))
            if not step.recorded:  # vectorized passes record nothing; neither does a rank without a share
                step.loss()
        assert step.recorded_loss is not None
        self._flat.look(slopes, self.record.batches - 1)
        return Estimate(step.recorded_loss, combination.gradients(slopes))

    def _slopes(self, step: Step, params: Params, combination: Combination, ks: Sequence[int]) -> Tensor:
        directions, parts = combination.directions, []
        ks = list(ks)
        while ks:
            size = self._chunk_used or 1
            drawn = directions[ks[0]] if size == 1 else directions.stack(ks[:size])
            try:
                slopes = along_one(step, params, drawn) if size == 1 else along_many(step, params, drawn)[1]
            except SkipBatchError:
                raise
            except Exception as error:
                self._after_failure(error, step, params, directions)
                continue  # the same directions, one by one
            parts.append(widen(slopes.reshape(-1)))
            combination.add(slopes, drawn)
            del ks[:size]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _after_failure(self, error: Exception, step: Step, params: Params, directions: Directions) -> None:
        """Raise errors that the loop has too; return if the loop can continue where a vectorized pass failed."""
        if self._chunk_used == 1:
            if isinstance(error, NotImplementedError | RuntimeError):
                raise self._explained(error, step, params, directions) from error
            raise error
        alone, _ = failing_layer(step.module, lambda: along_one(step, params, directions[0]))
        if isinstance(alone, SkipBatchError | NoForwardDerivativeError):
            raise alone
        if alone is not None:
            raise self._explained(alone, step, params, directions) from error
        self._one_by_one(first_line(error))

    def _explained(self, error: Exception, step: Step, params: Params, directions: Directions) -> Exception:
        alone, layer = failing_layer(step.module, lambda: along_one(step, params, directions[0]))
        if not isinstance(alone, NotImplementedError):
            return alone or error  # the user's own error, unchanged
        return MisconfigurationException(
            f"ForwardGradient: {layer or 'the loss'} has no forward-mode derivative in torch ({alone}). Replace it, or "
            "use ZerothOrder(), which needs none."
        )

    def on_batch_settled(self, succeeded: bool) -> None:
        """Keep the heads' gradients of the batch, or drop them."""
        if self._local_guesses is not None:
            self._local_guesses.settle(succeeded)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Step the heads together with the user's parameters."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._local_guesses is not None:
            self._local_guesses.step_heads(mean_over_ranks(trainer))

    def _restore(self) -> None:
        super()._restore()
        if self._local_guesses is not None:
            self._local_guesses.release()

    def rule_state(self) -> dict[str, Any]:
        """Return the chosen chunk, so that a resumed run rounds in the same way, and the heads."""
        heads = {} if self._local_guesses is None else {"guided": self._local_guesses.state_dict()}
        return {"chunk_used": self._chunk_used, **heads}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Restore the heads, and the chosen chunk unless the user asked for another."""
        if not isinstance(self.chunk_size, int) and state["chunk_used"] is not None:
            self._chunk_found = min(int(state["chunk_used"]), self.num_directions)
        if self._local_guesses is not None and "guided" in state:
            self._local_guesses.load_state_dict(state["guided"])

    def describe(self) -> dict[str, str]:
        """Return rows for the banner."""
        if self._local_guesses is not None:
            return self._local_guesses.describe()
        num, chunk = self.num_directions, self._chunk_used
        if chunk is None:
            cost = f"{num} directions ({2 + 2 * num} to {3 * num} forwards, decided at the first batch)"
        elif chunk == 1:
            cost = f"{num} dual forward{'s' * (num > 1)} ({DUAL_COST * num:g} forwards)"
        else:
            cost = f"{num} directions, {chunk} at a time ({1 + -(-num // chunk) + 2 * num} forwards)"
        return {"a step": cost, "route": f"forward-mode automatic differentiation, {self.directions} directions"}
