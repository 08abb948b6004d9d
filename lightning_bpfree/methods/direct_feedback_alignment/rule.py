"""Feedback alignment: errors reach the blocks of a network through fixed random matrices, not transposed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bpfree.core.arguments import NonEmpty, NonNegativeFloat, Patterns, PositiveFloat, checked
from lightning_bpfree.core.blocks import Blocks
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.step import Estimate, Step
from lightning_bpfree.methods.direct_feedback_alignment.feedback import (
    DirectFeedback,
    FixedMatrices,
    LayerwiseFeedback,
    Matrices,
    crossings,
)
from lightning_bpfree.training.network_rule import NetworkRule
from lightning_bpfree.training.training_rule import BACKPROP_COST


class DirectFeedbackAlignment(NetworkRule):
    """Trains every block of a network with the error at the network's output, sent through fixed random matrices.

    The error is the exact derivative of the user's loss with respect to the network's output. It is multiplied by the
    matrix of each block, and backprop carries the product to the parameters inside the block. Layers after the last
    block, and parameters outside of the network, get their exact gradient. No weight is used backward between blocks,
    and no block waits for the error of the next.

    The estimate is biased: it is not the gradient of the loss. It works because weights align with the feedback.

    Args:
        blocks: how to cut the network into blocks: a number of layers per block, a list of numbers, patterns of module
            names, or a function; see :func:`lightning_bpfree.core.blocks.cut`.
        network: name of the submodule that maps inputs to outputs; None for the only child with parameters, ``""`` for
            the LightningModule itself.
        feedback: ``"direct"``: from the network's output to the end of every block. ``"layerwise"``: from block to
            block, through a fixed matrix instead of the weight of the first layer of each block (feedback alignment).
        scale: factor on the feedback, > 0; 1 draws it as torch initializes the weights that it replaces.
        matrices: function that returns the feedback for a name and a shape, called once per fit. ``"direct"``:
            the block's name and ``(values of its output, values of the network's output)``, of one sample (or of one
            position, where both are sequences). ``"layerwise"``: the layer's name and the shape of its weight.
        learning_rates: factors on the optimizer's learning rate, one per block; None for 1.
        **settings: see :class:`TrainingRule`. ``seed`` also determines the feedback, which is fixed for the whole fit.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> DirectFeedbackAlignment().describe()["route"]
        'fixed random feedback from the output to every block'

    References:
        T. P. Lillicrap, D. Cownden, D. B. Tweed, C. J. Akerman, "Random synaptic feedback weights support error
        backpropagation for deep learning", 2016, Nature Communications 7:13276. A. Nøkland, "Direct Feedback Alignment
        Provides Learning in Deep Neural Networks", 2016, arXiv 1609.01596.
    """

    citation: ClassVar[str] = (
        "@inproceedings{nokland2016direct, title={Direct Feedback Alignment Provides Learning in Deep Neural "
        "Networks}, author={N{\\o}kland, Arild}, booktitle={Advances in Neural Information Processing Systems}, "
        "year={2016}}"
    )
    reevaluates = False

    @checked
    def __init__(
        self,
        blocks: Blocks = 1,
        network: str | None = None,
        *,
        feedback: Literal["direct", "layerwise"] = "direct",
        scale: PositiveFloat = 1.0,
        matrices: Matrices | None = None,
        learning_rates: Annotated[Sequence[NonNegativeFloat], NonEmpty()] | None = None,
        params: Patterns | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params=params, **settings)
        self.blocks, self.network, self.feedback = blocks, network, feedback
        self.scale, self.matrices, self.learning_rates = scale, matrices, learning_rates
        self._matrices = FixedMatrices(scale, matrices)

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Cut the network into blocks, and refuse layers that errors cannot pass."""
        super().check(trainer, module, slots)
        self._matrices = FixedMatrices(self.scale, self.matrices)
        if self.feedback == "layerwise":
            crossings(type(self).__name__, self.found_network, self.parts.blocks)

    def estimate(self, step: Step) -> Estimate:
        """Return the user's loss, whose graph carries the feedback to every block."""
        kind = DirectFeedback if self.feedback == "direct" else LayerwiseFeedback
        name, seed = type(self).__name__, self.record.seed or 0
        wired = kind(name, self.found_network, self.parts, self._matrices, seed)
        with wired():
            loss = step.loss(cost=self._cost())
        if not wired.calls:
            raise self.never_called()
        if not loss.requires_grad:
            raise MisconfigurationException(
                f"{name}: no gradient comes from the loss to the network's output: the training step cuts it (argmax, "
                "accuracy, NumPy, .item(), detach or no_grad). ZerothOrder() needs no derivative."
            )
        return Estimate(loss)

    def _cost(self) -> float:
        """Return the cost of a step in forward passes, by the sizes of weights; feedback itself is not counted."""
        if self.feedback == "layerwise":
            return BACKPROP_COST
        sizes = [[p.numel() for p in block.parameters if p.dim() > 1] for block in self.parts.blocks]
        rest = sum(p.numel() for p in self.parts.rest.values() if p.dim() > 1)
        inside = sum(sum(block[1:]) for block in sizes)  # gradients of activities are needed inside blocks only
        return 2.0 + inside / (sum(map(sum, sizes)) + rest)

    def describe(self) -> dict[str, str]:
        """Return rows for the banner."""
        way = "from the output to every block" if self.feedback == "direct" else "from block to block"
        rows = {"route": f"fixed random feedback {way}"}
        if self._parts is not None:
            rows["blocks"] = f"{len(self.parts.blocks)}: {', '.join(block.name for block in self.parts.blocks)}"
            rows["exact gradient"] = ", ".join(self.parts.rest) or "the output layer"
            rows["a step"] = f"{self._cost():.3g} forwards"
        return rows

    def _restore(self) -> None:
        super()._restore()
        self._matrices.clear()
