"""The base class of rules that work inside a network: on its blocks, or by replacing its forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules
from lightning_bpfree.core.blocks import Blocks, Cut, cut, find_network
from lightning_bpfree.core.forward_ad import compiled_parts
from lightning_bpfree.core.forward_override import ForwardOverride, override_of, removed
from lightning_bpfree.core.learning_rates import BlockRates
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.training.checks import check_made
from lightning_bpfree.training.ranks import mean_over_ranks
from lightning_bpfree.training.refusal import refusing
from lightning_bpfree.training.training_rule import TrainingRule


class LearningRateFactors(Protocol):
    """Factors on the changes that an optimizer step makes, such as :class:`BlockRates`."""

    def attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Scale the steps of ``optimizers``, and of no others."""

    def detach(self) -> None:
        """Stop scaling."""


class NetworkRule(TrainingRule):
    """Base class of rules that cut a network into blocks, or replace its forward pass.

    A subclass sets :attr:`network` and :attr:`blocks`, implements :meth:`estimate`, and may override:

    - :meth:`find_parts` cuts the network, and refuses networks that the rule cannot train.
    - :meth:`override` returns a replacement of ``network.forward``, during the fit and after it.
    - :meth:`auxiliary` returns the modules that the rule trains in addition to the user's.
    - :meth:`learning_rate_factors` returns factors on the learning rate of parts; by default :attr:`learning_rates`.
    - :meth:`start_over` drops state that was learned with another network.
    - :meth:`on_turn` is called at the start of each of the rule's epochs, and when a fit is resumed inside one.

    The base class does the rest. It finds the network and cuts it before the first batch (:meth:`install`). It restores
    the forward pass in epochs of plain backprop, and replaces it in the rule's own epochs. ``validate``, ``test`` and
    ``predict`` compute as in training. Auxiliary modules step with the user's optimizer and are saved with the
    checkpoint. The base class applies learning rates of blocks, refuses compiled modules, and releases the network
    after the fit.

    Args:
        **settings: see :class:`TrainingRule`.

    Examples:
        >>> from lightning_bpfree.core.block_hooks import leaving
        >>> from lightning_bpfree.core.step import Estimate
        >>> class NoisyFirstBlock(NetworkRule):
        ...     blocks = 1
        ...
        ...     def estimate(self, step):
        ...         with leaving({0: self.parts.blocks[0].modules[-1]}, lambda _, z: z + torch.randn_like(z)):
        ...             return Estimate(step.loss())
        >>> rule = NoisyFirstBlock()
        >>> rule.install(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))))
        >>> [block.name for block in rule.parts.blocks]
        ['0..1']
    """

    cuts_graphs = True
    rehearses: ClassVar[bool] = False  # what runs several times is the network, or parts of it
    network: str | None = None
    """Name of the submodule that maps inputs to outputs; see :func:`lightning_bpfree.core.blocks.find_network`."""
    blocks: Blocks | None = None
    """How to cut it, see :func:`lightning_bpfree.core.blocks.cut`; None for rules that find parts of another kind."""
    learning_rates: Any = None
    """Factors on the optimizer's learning rate, one for each block; None for 1."""
    of_a_fit = (*TrainingRule.of_a_fit, "_found", "_made_of", "_parts", "_override", "_factors")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._found: nn.Module | None = None  # the network
        self._made_of: Any = None
        self._parts: Any = None
        self._override: ForwardOverride | None = None
        self._factors: LearningRateFactors | None = None
        self._loaded = False  # whether a checkpoint's state waits for its network
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers, and what they were before the batch
        self._noted = self._had_override = self._has_stepped = False  # of a fit, until it ends

    # --- hooks of a rule ---

    def find_parts(self, name: str, network: nn.Module) -> Any:
        """Return the parts of the network that the rule works on; by default its blocks, a :class:`Cut`.

        Args:
            name: the network's name within the module.
            network: the network.

        Raises:
            ValueError: if the rule cannot work on this network; nothing has changed then.
        """
        parts = cut(network, 1 if self.blocks is None else self.blocks)
        rates = self.learning_rates
        if rates is not None and len(rates) != len(parts.blocks):
            raise ValueError(
                f"learning_rates={list(rates)}: give one factor for each of the {len(parts.blocks)} blocks "
                f"({', '.join(block.name for block in parts.blocks)})."
            )
        return parts

    def made_of(self) -> Any:
        """Return the settings that determine parts and override; both are rebuilt if the settings change."""
        return self.blocks

    def override(self, network: nn.Module, parts: Any) -> ForwardOverride | None:
        """Return a replacement of the network's forward pass; None leaves it unchanged.

        Args:
            network: the network.
            parts: the result of :meth:`find_parts`.
        """
        return None

    def auxiliary(self) -> Mapping[str, AuxiliaryModules]:
        """Return the modules that the rule trains in addition to the user's, by the names used in checkpoints."""
        return {}

    def learning_rate_factors(self) -> LearningRateFactors | None:
        """Return factors on the learning rate for the parts of the network; called once before the first batch."""
        if self.learning_rates is None:
            return None
        return BlockRates([(b.parameters, f) for b, f in zip(self.parts.blocks, self.learning_rates, strict=True)])

    def start_over(self) -> None:
        """Drop state that was learned with another network, or in an earlier fit.

        State that a checkpoint has restored for this network and this fit is kept.
        """

    def on_turn(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prepare an epoch of the rule; called after the rule is installed."""

    # --- the network ---

    @property
    def parts(self) -> Cut:
        """Blocks and rest of the network, once the rule has been installed."""
        assert self._parts is not None, "the rule has not been installed yet"
        parts: Cut = self._parts
        return parts

    @property
    def found_network(self) -> nn.Module:
        """The network, once the rule has been installed."""
        assert self._found is not None, "the rule has not been installed yet"
        return self._found

    @property
    def replaces_forward(self) -> bool:
        """Whether the rule replaces the network's forward pass."""
        return type(self).override is not NetworkRule.override

    def install(self, module: nn.Module) -> None:
        """Find the network in ``module``, and replace its forward pass if the rule does so during the fit.

        Call it to use weights that such a rule has trained, outside of the fit. After loading a checkpoint, first call
        ``load_state_dict(checkpoint["callbacks"][rule.state_key])`` if the rule has its own modules.

        Args:
            module: the LightningModule, or a module that holds the network under the same name.
        """
        name, network = self._network_in(module)
        self.resolve()  # attributes may have been set
        another = self._found is not network
        if another or self._made_of != self.made_of():
            parts, self._made_of = self.find_parts(name, network), self.made_of()
            self.uninstall(module)
            if another and self._found is not None and not self._loaded:
                self.start_over()
            self._found = None  # until everything has succeeded
            made = self.override(network, parts)
            self._found, self._parts, self._override, self._loaded = network, parts, made, False
            if made is not None:
                made.set_rule(type(self).__name__)
        if self._override is not None:
            self._override.install()

    def _network_in(self, module: nn.Module) -> tuple[str, nn.Module]:
        """Return name and module of the network: the one that was found before, as long as the module has it.

        Another child that is added during a fit, such as a second head, does not belong to the rule.
        """
        if self.network is None and self._found is not None:
            for name, part in module.named_modules():
                if part is self._found:
                    return name, part
        return find_network(module, self.network)

    def uninstall(self, module: nn.Module | None = None) -> None:
        """Restore the network's own forward pass.

        Args:
            module: the module that holds the network, such as a copy of the one in training; None for the last one
                installed.
        """
        found = self._override
        if module is not None and self.replaces_forward:
            found = override_of(self._network_in(module)[1])
        if found is not None and found.rule == type(self).__name__:
            found.remove()

    def without(self) -> AbstractContextManager[None]:
        """Return a context in which the network computes as it does without the rule."""
        return removed(self._override)

    def never_called(self) -> MisconfigurationException:
        """Return the error for a training step that did not call the network."""
        return MisconfigurationException(
            f"{type(self).__name__}: the training step never called {self.network or 'its network'}: name the "
            "submodule that maps inputs to scores, network=...."
        )

    # --- one fit ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace the training step; refuse compiled modules."""
        super().setup(trainer, pl_module, stage)
        compiled = compiled_parts(pl_module) if stage == "fit" else []
        if compiled:
            raise MisconfigurationException(
                f"{type(self).__name__} works inside the network while it runs, which torch.compile does not allow: "
                f"{', '.join(compiled)} is compiled. Train the module as it was before torch.compile."
            )

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Cut the network, and replace its forward pass if the first epoch is the rule's."""
        check_made(type(self).__name__, module)
        with refusing(type(self).__name__, ValueError):
            self._note_override(module)
            self.install(module)
        self._factors = self.learning_rate_factors()
        if not self.active(trainer.current_epoch):
            self.uninstall()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install or uninstall the rule: a fit that is resumed inside an epoch starts no epoch."""
        super().on_train_start(trainer, pl_module)
        self._take_turn(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record whether this epoch is the rule's, and install or uninstall the rule."""
        super().on_train_epoch_start(trainer, pl_module)
        self._take_turn(trainer, pl_module)

    def _note_override(self, module: nn.Module) -> None:
        """Note whether the forward pass was replaced before the fit, to restore that if the fit fails."""
        if not self._noted:
            self._had_override = override_of(self._network_in(module)[1]) is not None
            self._noted = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the network if the fit failed before it trained anything."""
        if self._noted and not self._had_override and not self._has_stepped:
            self.uninstall()
        super().on_exception(trainer, pl_module, exception)

    def _take_turn(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        active = self.active(trainer.current_epoch)
        if self._factors is not None:
            self._factors.attach(trainer.optimizers if active else [])
        if not active:
            self.uninstall(pl_module)
            return
        self.install(pl_module)
        self.on_turn(trainer, pl_module)

    def predict_as_trained(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Let the network compute as in training; called when an evaluation starts."""
        if trainer.state.fn == TrainerFn.FITTING or not self.replaces_forward:
            return
        self.install(module) if self.record.trained_last(self.active(0)) else self.uninstall(module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the network compute as in training."""
        self.predict_as_trained(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the network compute as in training."""
        self.predict_as_trained(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the network compute as in training."""
        self.predict_as_trained(trainer, pl_module)

    def on_batch_settled(self, succeeded: bool) -> None:
        """Keep the auxiliary modules' gradients of the batch, or drop them."""
        for own in self.auxiliary().values():
            own.settle(succeeded)
        if not succeeded:
            for buffer, before in self._statistics:
                buffer.copy_(before)
        self._statistics = []

    def begin_batch(self) -> None:
        """Drop the proposals of an interrupted batch, and save the network's buffers.

        Buffers, such as running means, are restored if the batch is skipped.
        """
        self._statistics = []
        self.on_batch_settled(False)
        self._statistics = [(buffer, buffer.clone()) for buffer in self.found_network.buffers()]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Step the auxiliary modules too."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._has_stepped = True
        for own in self.auxiliary().values():
            own.step(mean_over_ranks(trainer))

    def _begin_anew(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trained = self._has_trained
        super()._begin_anew(trainer, module)
        if trained and not self._has_trained:
            self._found = None  # the replacement of its forward pass is made again

    def _restore(self) -> None:
        super()._restore()
        if self._factors is not None:
            self._factors.detach()
        self._factors, self._statistics = None, []
        self._noted = self._had_override = self._has_stepped = False
        if not self.replaces_forward and not self.auxiliary():  # else the network still needs the rule
            self._found = self._parts = None

    # --- checkpoints ---

    def rule_state(self) -> dict[str, Any]:
        """Return the auxiliary modules, and the states of their optimizers."""
        return {name: own.state_dict() for name, own in self.auxiliary().items()}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Restore the auxiliary modules."""
        self._loaded = True
        for name, own in self.auxiliary().items():
            if state.get(name) is not None:
                own.load_state_dict(state[name])
