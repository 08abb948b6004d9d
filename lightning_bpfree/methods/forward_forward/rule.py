"""Forward-Forward and Integrated Forward-Forward: every block learns to tell positive from negative samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_bpfree.core.arguments import (
    AtLeastTwo,
    NonEmpty,
    NonNegativeFloat,
    NonNegativeInt,
    Patterns,
    PositiveFloat,
    PositiveInt,
    checked,
)
from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules
from lightning_bpfree.core.blocks import Blocks, Cut
from lightning_bpfree.core.labels import LabelsOf
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.step import Estimate, Step, check_finite
from lightning_bpfree.methods.forward_forward.goodness import Goodness, Length
from lightning_bpfree.methods.forward_forward.network import EMBEDDING, GoodnessNetwork
from lightning_bpfree.methods.forward_forward.settings import (
    GoodnessSettings,
    LabelInput,
    LabelKind,
    Negatives,
    NegativesKind,
    Prediction,
    Schedule,
)
from lightning_bpfree.methods.forward_forward.training_pass import GoodnessPass, PeerNormalization, first_layer
from lightning_bpfree.training.network_rule import NetworkRule


class ForwardForward(NetworkRule):
    """Trains every block of a network with its own loss: high goodness on data, low goodness on wrong data.

    A positive sample is an input with its true label embedded, a negative one has a wrong label. A block's goodness is
    the sum (or mean) of its squared activities. A block's input is detached from the previous block, and normalized to
    unit length. With one layer per block, this is Hinton's Forward-Forward. Within a block of several layers, backprop
    computes the gradients: this is the Integrated Forward-Forward algorithm.

    The loss of the user's training step does not train the blocks. While the rule is active, and after the fit, calling
    the network returns scores of shape ``(B, num_classes)``, so that the user's steps and metrics work unchanged; see
    ``prediction``. The last layer, which computed the scores, is used only by ``prediction="readout"``.

    Args:
        blocks: how to cut the network into blocks: a number of layers per block, a list of numbers, patterns of module
            names, or a function; see :func:`lightning_bpfree.core.blocks.cut`.
        network: name of the submodule that maps inputs to scores; None for the only child with parameters, ``""`` for
            the LightningModule itself.
        prediction: what the network returns. ``"goodness"``: for every label, the goodness of the input with that
            label, summed over blocks; costs ``num_classes`` forward passes, folded into the batch. ``"readout"``: the
            output of the last layer on the last block's normalized activities under a neutral label, in one pass; the
            user's loss trains only that layer.
        goodness: ``"sum"`` or ``"mean"`` of squares.
        threshold: mean square activity that separates positive from negative samples, > 0; Hinton: 1, Tang: 1.5.
        temperature: temperature of the logistic function of the goodness, > 0, in units of the goodness.
        length: length to which a block's input is scaled: ``"rms"`` (mean square 1), ``"unit"`` or ``"none"``.
        negatives: ``"wrong_label"`` (uniform over the others), ``"hard"`` (a wrong label that the current
            model finds likely; with ``prediction="goodness"`` at the cost of ``num_classes`` more passes), ``"hybrid"``
            (images mixed of two, without labels), or a function ``(inputs, labels)`` that returns wrong labels or
            negative inputs.
        label: how the label enters: ``"overlay"`` (written over the first values of the input), ``"embedding"`` (a
            learned pattern added to the first block's input; kept with the rule), ``"none"`` (unsupervised; needs
            ``negatives="hybrid"`` or a function), or a function ``(inputs, labels or None)`` returning inputs.
        first_block: first block whose goodness counts in predictions; Hinton leaves out the first layer (1).
        schedule: ``"simultaneous"``: all blocks learn from every batch. ``"greedy"``: one after another.
        epochs_per_block: epochs per block in the greedy schedule; None divides ``max_epochs`` evenly.
        learning_rates: factors on the optimizer's learning rate, one per block; None for 1.
        peer_normalization: strength of the pull of every unit's mean activity toward its layer's, >= 0; Hinton: 0.03.
        embedding_lr: learning rate (Adam) of ``label="embedding"``.
        num_classes: number of labels; None takes the width of the network's last layer.
        labels: function that returns the labels of a batch that is not a pair (inputs, labels).
        **settings: see :class:`TrainingRule`.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> ForwardForward(blocks=2, goodness="mean", threshold=1.5).describe()["prediction"]
        'goodness of every label (num_classes forwards)'

    References:
        G. Hinton, "The Forward-Forward Algorithm: Some Preliminary Investigations", 2022, arXiv 2212.13345. D. Y. M.
        Tang, "The Integrated Forward-Forward Algorithm", 2023, arXiv 2305.12960.
    """

    citation: ClassVar[str] = (
        "@article{hinton2022forward, title={The Forward-Forward Algorithm: Some Preliminary Investigations}, "
        "author={Hinton, Geoffrey}, journal={arXiv preprint arXiv:2212.13345}, year={2022}}"
    )
    logged: ClassVar[dict[str, str]] = {
        **NetworkRule.logged,
        "bpfree/forward_forward/blocks/<index>/loss": "local loss of a block",
        "bpfree/forward_forward/blocks/<index>/positive": "mean goodness a unit of positive samples",
        "bpfree/forward_forward/blocks/<index>/negative": "mean goodness a unit of negative samples",
    }
    estimates_user_loss: ClassVar[bool] = False

    @checked
    def __init__(
        self,
        blocks: Blocks = 1,
        network: str | None = None,
        *,
        prediction: Prediction = "goodness",
        goodness: Goodness = "sum",
        threshold: PositiveFloat = 1.0,
        temperature: PositiveFloat = 1.0,
        length: Length = "rms",
        negatives: NegativesKind | Negatives = "wrong_label",
        label: LabelKind | LabelInput = "overlay",
        first_block: NonNegativeInt = 0,
        schedule: Schedule = "simultaneous",
        epochs_per_block: PositiveInt | None = None,
        learning_rates: Annotated[Sequence[NonNegativeFloat], NonEmpty()] | None = None,
        peer_normalization: NonNegativeFloat = 0.0,
        embedding_lr: PositiveFloat = 0.01,
        num_classes: AtLeastTwo | None = None,
        labels: LabelsOf | None = None,
        params: Patterns | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params=params, **settings)
        self.blocks, self.network, self.prediction = blocks, network, prediction
        self.goodness, self.threshold, self.temperature, self.length = goodness, threshold, temperature, length
        self.negatives, self.label, self.first_block = negatives, label, first_block
        self.schedule, self.epochs_per_block, self.learning_rates = schedule, epochs_per_block, learning_rates
        self.peer_normalization, self.num_classes, self.labels = peer_normalization, num_classes, labels
        self.embedding_lr = embedding_lr
        self._peers: PeerNormalization | None = None
        self._own: AuxiliaryModules | None = None
        self._rank, self._greedy = 0, 0
        self._learned: set[int] = set()  # ids of parameters with a gradient since the last step of the optimizer
        self.resolve()

    def resolve(self) -> None:
        """Build the settings of the network and of a step; keep running means and label embedding."""
        super().resolve()
        fields = [field.name for field in dataclasses.fields(GoodnessSettings)]
        self._settings = GoodnessSettings(**{name: getattr(self, name) for name in fields})
        self.reevaluates = self.prediction == "readout" or self.negatives == "hard"
        if not self.peer_normalization:
            self._peers = None
        elif self._peers is None:
            self._peers = PeerNormalization(self.peer_normalization)
        else:
            self._peers.strength = self.peer_normalization
        if self.label != "embedding":
            self._own = None
        elif self._own is None:
            self._own = AuxiliaryModules("adam", self.embedding_lr)
        else:
            self._own.configure("adam", self.embedding_lr)

    # --- the network's forward pass ---

    def made_of(self) -> Any:
        """Return the settings that determine the network's forward pass."""
        return self._settings, super().made_of()

    def find_parts(self, name: str, network: nn.Module) -> Cut:
        """Cut the network into blocks."""
        parts: Cut = super().find_parts(name, network)
        self._settings.check_cut(parts)
        return parts

    def override(self, network: nn.Module, parts: Cut) -> GoodnessNetwork:
        """Return a network that computes scores by goodness or readout."""
        if self.record.seed is None:
            self.record.seed = self.seed
        return GoodnessNetwork(network, parts, self._settings, self._own, self.record)

    def start_over(self) -> None:
        """Start with a new label embedding, and without running means."""
        self._own = None if self._own is None else AuxiliaryModules("adam", self.embedding_lr)
        self._peers = None if self._peers is None else PeerNormalization(self.peer_normalization)

    def auxiliary(self) -> Mapping[str, AuxiliaryModules]:
        """Return the label embedding."""
        return {} if self._own is None else {"own": self._own}

    @property
    def _network(self) -> GoodnessNetwork | None:
        assert self._override is None or isinstance(self._override, GoodnessNetwork)
        return self._override

    # --- one fit ---

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Cut the network into blocks."""
        super().check(trainer, module, slots)
        in_blocks = {id(parameter) for block in self.parts.blocks for parameter in block.parameters}
        if self.prediction == "goodness" and in_blocks.isdisjoint(id(slot.parameter) for slot in slots.trainable()):
            raise MisconfigurationException(
                f"ForwardForward(params={self.params!r}): none of these parameters is in a block, so nothing would be "
                f"trained. The blocks: {', '.join(block.name for block in self.parts.blocks)}."
            )
        if self.schedule == "greedy" and self._epochs_of_a_block(trainer) < 1:
            raise MisconfigurationException(
                f"ForwardForward(schedule='greedy'): max_epochs={trainer.max_epochs} and stop_epoch={self.stop_epoch} "
                f"leave no epoch for each of {len(self.parts.blocks)} blocks. Give the Trainer more max_epochs, or "
                "pass epochs_per_block."
            )
        if self.label == "overlay" and isinstance(first_layer(self.parts.blocks[0]), nn.modules.conv._ConvNd):
            rank_zero_warn(
                "ForwardForward(label='overlay') writes the label into the first pixels of an image, and a convolution "
                "sees it in one corner only: accuracy may stay at chance. Pass label='embedding', which adds a "
                "learned pattern to the whole image."
            )
        self._rank = trainer.global_rank

    def _epochs_of_a_block(self, trainer: pl.Trainer) -> int:
        ends = [end for end in (trainer.max_epochs, self.stop_epoch) if end is not None and end >= 0]
        return self.epochs_per_block or (min(ends, default=0) - self.start_epoch) // len(self.parts.blocks)

    def on_turn(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Choose the block that learns in this epoch."""
        if self.schedule == "greedy":
            turn = (trainer.current_epoch - self.start_epoch) // max(1, self._epochs_of_a_block(trainer))
            self._greedy = min(len(self.parts.blocks) - 1, turn)

    def estimate(self, step: Step) -> Estimate:
        """Return the user's loss, and the gradient of every block's own loss."""
        assert self._network is not None
        trained = [self._greedy] if self.schedule == "greedy" else list(range(len(self.parts.blocks)))
        work = GoodnessPass(step, self._settings, trained, self._peers, self._rank)
        self.begin_batch()
        with self._network.in_training(work):
            loss = step.loss(cost=self._network.cost())
        if not work.calls:
            raise self.never_called()
        self._check_numbers(work, loss)
        if self._own is not None and work.embedding_gradient is not None:
            self._own.propose(EMBEDDING, [work.embedding_gradient])
        gradients = {**work.of_the_rest(loss, self.parts), **work.gradients}
        self._learned |= {id(slot.parameter) for slot in step.trained if slot.name in gradients}
        zeros = {slot.name: torch.zeros_like(slot.parameter) for slot in step.trained if slot.name not in gradients}
        metrics = {f"blocks/{name}": value for name, value in work.metrics.items()}
        return Estimate(loss.detach(), {**gradients, **zeros}, metrics)

    def _check_numbers(self, work: GoodnessPass, loss: Tensor) -> None:
        """Raise NonFiniteLossError before anything has moved if a number that is differentiated is not finite."""
        numbers = {**work.numbers, **{f"the loss of block {name}": value for name, value in work.losses.items()}}
        check_finite({**numbers, "the loss": loss} if loss.requires_grad else numbers)

    def on_batch_settled(self, succeeded: bool) -> None:
        """Keep the label embedding and running means of the batch, or drop them."""
        super().on_batch_settled(succeeded)
        if self._peers is not None:
            self._peers.settle(succeeded)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Keep parameters without a loss unchanged: inactive blocks, and an unused last layer."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.active(trainer.current_epoch):
            for parameter in pl_module.parameters():
                if id(parameter) not in self._learned:
                    parameter.grad = None  # a gradient of zero would still move it, by momentum or weight decay
        self._learned.clear()

    def describe(self) -> dict[str, str]:
        """Return rows for the banner."""
        rows = {
            "prediction": "readout of the last block (1 forward)"
            if self.prediction == "readout"
            else "goodness of every label (num_classes forwards)"
        }
        if self._network is not None:
            parts = self.parts
            rows["blocks"] = f"{len(parts.blocks)}: {', '.join(block.name for block in parts.blocks)}"
            if parts.rest:
                rows["in no block"] = ", ".join(parts.rest) + (
                    " (trained by the module's own loss)" if self.prediction == "readout" else " (not used)"
                )
            rows["a step"] = f"{self._network.cost():.3g} forwards"
        return {**rows, "route": "a loss in every block, no gradient between blocks"}

    # --- checkpoints ---

    def rule_state(self) -> dict[str, Any]:
        """Return the running means of peer normalization, and the label embedding."""
        peers = {} if self._peers is None else self._peers.means
        return {"peers": {name: mean.clone() for name, mean in peers.items()}, "own": None, **super().rule_state()}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Restore running means and label embedding."""
        self.resolve()
        super().load_rule_state(state)
        if self._peers is not None:
            self._peers.means = dict(state["peers"])
