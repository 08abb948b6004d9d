"""Forward-Forward and Integrated Forward-Forward: every block learns to tell positive from negative samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

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
from lightning_bpfree.core.blocks import Blocks, Cut, cut, find_network
from lightning_bpfree.core.forward_ad import compiled_parts
from lightning_bpfree.core.forward_override import override_of, removed
from lightning_bpfree.core.labels import LabelsOf
from lightning_bpfree.core.learning_rates import BlockRates
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.step import Estimate, Step
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
from lightning_bpfree.methods.forward_forward.training_pass import GoodnessPass, PeerNormalization
from lightning_bpfree.training.training_rule import TrainingRule


class ForwardForward(TrainingRule):
    """Trains every block of a network by a loss of its own: high goodness on data, low goodness on wrong data.

    A positive sample is an input with its true label in it, a negative one has a wrong label. A block's goodness is the
    sum (or mean) of its squared activities; what enters a block is cut off from the one before, and has unit length. A
    block of one layer is Hinton's Forward-Forward; within a block of several layers, gradients are had by backprop,
    which is the Integrated Forward-Forward algorithm.

    The loss of the user's training step does not train the blocks. While the rule is active, and after the fit, calling
    the network returns scores of shape ``(B, num_classes)``, so that the user's steps and metrics work unchanged; see
    ``prediction``. The last layer, which made the scores, is used by ``prediction="readout"`` only.

    Args:
        blocks: how to cut the network into blocks: a number of layers a block, their numbers, patterns of module names,
            or a function; see :func:`lightning_bpfree.core.blocks.cut`.
        network: name of the submodule that maps inputs to scores; None for the only child with parameters, ``""`` for
            the LightningModule itself.
        prediction: what the network returns. ``"goodness"``: of every label, the goodness of the input with that label,
            summed over blocks; costs ``num_classes`` forward passes, folded into the batch. ``"readout"``: what the
            last layer makes of the last block's normalised activities under a neutral label, in one pass; the user's
            loss trains that layer alone.
        goodness: ``"sum"`` or ``"mean"`` of squares.
        threshold: mean square activity that tells positive from negative samples, > 0; Hinton: 1, Tang: 1.5.
        temperature: of the logistic function of the goodness, > 0, in units of the goodness.
        length: to which what enters a block is scaled: ``"rms"`` (mean square 1), ``"unit"`` or ``"none"``.
        negatives: ``"wrong_label"`` (uniform among the others), ``"hard"`` (a wrong label that the present model
            likes; with ``prediction="goodness"`` at the cost of ``num_classes`` more passes), ``"hybrid"`` (images
            mixed of two, without labels), or a function ``(inputs, labels)`` that returns wrong labels or negative
            inputs.
        label: how the label enters: ``"overlay"`` (written over the first values of the input), ``"embedding"`` (a
            learned pattern added to the first block's input; kept with the rule), ``"none"`` (unsupervised; needs
            ``negatives="hybrid"`` or a function), or a function ``(inputs, labels or None)`` returning inputs.
        first_block: first block whose goodness counts in predictions; Hinton leaves out the first layer (1).
        schedule: ``"simultaneous"``: all blocks learn from every batch. ``"greedy"``: one after the other.
        epochs_per_block: of the greedy schedule; None shares ``max_epochs`` out evenly.
        learning_rates: factors on the optimizer's learning rate, one a block; None for 1.
        peer_normalization: strength of the pull of every unit's mean activity towards its layer's, >= 0; Hinton: 0.03.
        embedding_lr: learning rate (Adam) of ``label="embedding"``.
        num_classes: number of labels; None takes the width of the network's last layer.
        labels: takes the labels out of a batch that is no pair (inputs, labels).
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
        self._network: GoodnessNetwork | None = None
        self._rates: BlockRates | None = None
        self._rank, self._greedy, self._loaded = 0, 0, False
        self._learned: set[int] = set()  # ids of parameters with a gradient since the last step of the optimizer
        self.resolve()

    def resolve(self) -> None:
        """Make the settings of the network and of a step; running means and label embedding stay."""
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

    def install(self, module: nn.Module) -> None:
        """Let the network in ``module`` return scores by goodness or readout, as during the fit.

        Needed for weights that this rule has trained and that are used without it: after loading a checkpoint, call
        ``load_state_dict(checkpoint["callbacks"][rule.state_key])`` if ``label="embedding"``, and then this.

        Args:
            module: the LightningModule, or a module that holds the network under the same name.
        """
        _, network = find_network(module, self.network)
        self.resolve()  # attributes may have been set
        if self._network is not None and self._made_of != (self._settings, self.blocks):
            self._network.remove()
            self._network = self._made(self._network.network)
        if self._network is None or self._network.network is not network:
            if self._network is not None and not self._loaded:  # another network: it starts afresh
                self._own = None if self._own is None else AuxiliaryModules("adam", self.embedding_lr)
                self._peers = None if self._peers is None else PeerNormalization(self.peer_normalization)
            self._network, self._loaded = self._made(network), False
        self._network.install()

    def uninstall(self, module: nn.Module | None = None) -> None:
        """Give the network's own forward pass back.

        Args:
            module: whose network, such as a copy of the one in training; None for the last one that was installed.
        """
        found = self._network if module is None else override_of(find_network(module, self.network)[1])
        if isinstance(found, GoodnessNetwork):
            found.remove()

    def without(self) -> AbstractContextManager[None]:
        """Let the network be itself in this context."""
        return removed(self._network)

    def _made(self, network: nn.Module) -> GoodnessNetwork:
        self._made_of = self._settings, self.blocks
        parts = cut(network, self.blocks)
        self._settings.check_cut(parts)
        if self.learning_rates is not None and len(self.learning_rates) != len(parts.blocks):
            raise ValueError(
                f"learning_rates={list(self.learning_rates)}: give one factor for each of the {len(parts.blocks)} "
                f"blocks ({', '.join(block.name for block in parts.blocks)})."
            )
        if self.record.seed is None:
            self.record.seed = self.seed
        return GoodnessNetwork(network, parts, self._settings, self._own, self.record)

    @property
    def parts(self) -> Cut:
        """Blocks and rest of the network, once the rule has been installed."""
        assert self._network is not None, "the rule has not seen its network yet"
        return self._network.parts

    # --- one fit ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """StepSwap the training step."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            compiled = compiled_parts(pl_module)
            if compiled:
                raise MisconfigurationException(
                    f"ForwardForward looks into the network while it runs, which torch.compile does not allow: "
                    f"{', '.join(compiled)} is compiled. Train the module as it was before torch.compile."
                )

    def _predict_as_trained(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            return
        self.install(pl_module) if self.record.trained_last(self.active(0)) else self.uninstall(pl_module)

    on_validation_start = on_test_start = on_predict_start = _predict_as_trained

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Cut the network into blocks."""
        self.install(module)
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
        if not self.active(trainer.current_epoch):
            self.uninstall()
        self._rank = trainer.global_rank
        if self.learning_rates is not None:
            pairs = zip(self.parts.blocks, self.learning_rates, strict=True)
            self._rates = BlockRates([(block.parameters, factor) for block, factor in pairs])

    def _epochs_of_a_block(self, trainer: pl.Trainer) -> int:
        ends = [end for end in (trainer.max_epochs, self.stop_epoch) if end is not None and end >= 0]
        return self.epochs_per_block or (min(ends, default=0) - self.start_epoch) // len(self.parts.blocks)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take one's turn: a fit that is resumed inside an epoch begins none."""
        self._take_turn(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note whose epoch this is, and which block's."""
        super().on_train_epoch_start(trainer, pl_module)
        self._take_turn(trainer, pl_module)

    def _take_turn(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._rates is not None:
            self._rates.attach(trainer.optimizers if self.active(trainer.current_epoch) else [])
        if not self.active(trainer.current_epoch):
            self.uninstall()
            return
        self.install(pl_module)
        if self.schedule == "greedy":
            turn = (trainer.current_epoch - self.start_epoch) // max(1, self._epochs_of_a_block(trainer))
            self._greedy = min(len(self.parts.blocks) - 1, turn)

    def estimate(self, step: Step) -> Estimate:
        """Return the user's loss, and the gradient of every block's own loss."""
        assert self._network is not None
        trained = [self._greedy] if self.schedule == "greedy" else list(range(len(self.parts.blocks)))
        work = GoodnessPass(step, self._settings, trained, self._peers, self._rank)
        self._network.training_pass = work
        try:
            loss = step.loss(cost=self._network.cost())
        finally:
            self._network.training_pass = None
        if not work.calls:
            raise MisconfigurationException(
                f"ForwardForward: the training step never called {self.network or 'its network'}: name the submodule "
                "that maps inputs to scores, network=...."
            )
        if self._own is not None and work.embedding_gradient is not None:
            self._own.add_gradients(EMBEDDING, [work.embedding_gradient])
        gradients = {**work.of_the_rest(loss, self.parts), **work.gradients}
        self._learned |= {id(slot.parameter) for slot in step.trained if slot.name in gradients}
        zeros = {slot.name: torch.zeros_like(slot.parameter) for slot in step.trained if slot.name not in gradients}
        metrics = {f"blocks/{name}": value for name, value in work.metrics.items()}
        return Estimate(loss.detach(), {**gradients, **zeros}, metrics)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Keep parameters without a loss untouched: blocks that wait, and a last layer that is not used."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._own is not None:
            ranks = trainer.world_size
            mean = partial(trainer.strategy.reduce, reduce_op="mean")
            self._own.step(mean if ranks > 1 else None)
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

    def _restore(self) -> None:
        super()._restore()
        if self._rates is not None:
            self._rates.detach()

    # --- checkpoints ---

    def rule_state(self) -> dict[str, Any]:
        """Return the running means of peer normalisation, and the label embedding."""
        peers = {} if self._peers is None else self._peers.means
        own = None if self._own is None else self._own.state_dict()
        return {"peers": {name: mean.clone() for name, mean in peers.items()}, "own": own}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Take running means and label embedding back."""
        self.resolve()
        self._loaded = True
        if self._peers is not None:
            self._peers.means = dict(state["peers"])
        if self._own is not None and state["own"] is not None:
            self._own.load_state_dict(state["own"])
