"""Width, depth, kernel sizes and resolution of a network, learned with its weights under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_bpfree.core.arguments import (
    Fraction,
    Patterns,
    PositiveFloat,
    PositiveInt,
    check_attributes,
    checked,
)
from lightning_bpfree.methods.learnable_architecture.architecture import Architecture
from lightning_bpfree.methods.learnable_architecture.budgets import Budget, make_budget
from lightning_bpfree.methods.learnable_architecture.companions import (
    OptimizersWithoutSizes,
    check_companions,
    check_optimization,
)
from lightning_bpfree.methods.learnable_architecture.examples import Example, example_call, network_of
from lightning_bpfree.methods.learnable_architecture.export import ExportedNetwork, export
from lightning_bpfree.methods.learnable_architecture.pictures import architecture_picture
from lightning_bpfree.methods.learnable_architecture.search import Search, seconds
from lightning_bpfree.methods.learnable_architecture.sizes.axes import DIMENSIONS, Dimension
from lightning_bpfree.methods.learnable_architecture.sizes.cost import Measure
from lightning_bpfree.training.checks import check_whole_parameters
from lightning_bpfree.training.logging_of_rules import is_log_due, log_settings, settings_of
from lightning_bpfree.training.saved_streams import SavedStreams
from lightning_bpfree.training.shown_pictures import show
from lightning_bpfree.training.trainer_attributes import without_module

NAME = "learnable_architecture"
"""The attribute of the module under which the sizes are."""
_FAR = 0.1  # from the budget, relative: what is worth a line when the sizes are fixed


class LearnableArchitecture(Callback):
    """Learns the sizes of a network together with its weights, by the gradient of its loss, within a budget.

    Every size is a mask with one parameter. Units, blocks, taps and frequencies whose mask is below 0.1 are cropped, so
    that only the smaller network is computed. A term in the loss moves the cost to the budget. After ``fix_at`` of the
    fit, the sizes are scaled by about one factor to the budget within ``tolerance`` and fixed; training of the weights
    continues.

    - ``width``: units of linear layers and convolutions with their norms, tied along residual streams; hidden units of
      MLPs, and heads of attention. Masks are applied where units are read, after norm and activation.
    - ``depth``: residual blocks of a list; the last ones are removed first.
    - ``kernel``: taps of :class:`ContinuousConv`, and of ordinary convolutions with odd size and same padding.
    - ``resolution``: sizes of :class:`FrequencyCrop`, as in :class:`CCNN`.

    The structure of the network is traced with evaluations of one example at the start. Parameters keep their shapes
    and names, so that optimizers, schedulers and checkpoints do not change; the sizes have their own optimizer (SGD)
    and are saved with the callback. After the fit the network computes with its sizes until :meth:`undo`, and
    :meth:`export` returns a plain one. Works with plain Lightning, ``Backprop``, ``ForwardGradient`` and
    ``ZerothOrder``.

    Logs ``bpfree/architecture/cost_over_budget`` and ``bpfree/architecture/<size>`` every ``log_every_n_steps``.

    Args:
        budget: share of the reference's cost, or with ``relative=False`` the cost itself; above 0.
        dims: sizes to learn, of ``"width"``, ``"depth"``, ``"kernel"``, ``"resolution"``; None for all available.
        cost: ``"macs"`` (multiply-accumulates of one sample), ``"params"``, or ``"latency"`` (measured seconds of one
            sample on the device of the fit).
        relative: whether the budget is relative to a reference.
        reference: network whose cost counts as 1; None for the network itself before it is cropped.
        network: name of the submodule that is the network; None for the module itself, or for its only child with
            parameters if the module has no ``forward``.
        example_inputs: one example of the network's inputs: a tensor, a tuple, or a dict of keywords; None uses
            ``example_input_array`` of the module, or the first training batch.
        exclude: patterns of names of layers and blocks that keep their sizes.
        weight: weight of the squared relative deviation from the budget in the loss; above 0.
        lr: initial learning rate of the sizes (SGD, gradient clipped to norm 1), above 0; it falls to 0 by the time
            that they are fixed.
        fix_at: share of the fit's steps after which sizes are fixed, in [0, 1].
        tolerance: relative deviation from the budget that is allowed when sizes are fixed, above 0.
        update_every: optimizer steps between two changes of the crops, >= 1; masks change at each step.
        strict: whether layers whose width cannot be learned are an error; False leaves them unchanged and lists them.
        pictures: whether to draw the architecture over training, which needs matplotlib.
        dirpath: folder for the picture; None uses ``architecture`` in the Trainer's ``default_root_dir``.

    Raises:
        ValueError: for arguments out of range.
        MisconfigurationException: in ``setup``, for unsupported settings; the message says what to change.

    Examples:
        >>> callback = LearnableArchitecture(budget=0.5, dims=("width", "depth"))
        >>> callback.budget
        0.5

    References:
        D. W. Romero, N. Zeghidour, "DNArch: Learning Convolutional Neural Architectures by Backpropagation", 2023,
        arXiv 2302.05400.
    """

    citation: ClassVar[str] = (
        "@article{romero2023dnarch, title={DNArch: Learning Convolutional Neural Architectures by Backpropagation}, "
        "author={Romero, David W. and Zeghidour, Neil}, journal={arXiv preprint arXiv:2302.05400}, year={2023}}"
    )

    @checked
    def __init__(
        self,
        budget: PositiveFloat = 0.5,
        dims: Sequence[Dimension] | None = None,
        *,
        cost: Measure = "macs",
        relative: bool = True,
        reference: nn.Module | None = None,
        network: str | None = None,
        example_inputs: Example | None = None,
        exclude: Patterns | None = None,
        weight: PositiveFloat = 10.0,
        lr: PositiveFloat = 0.02,
        fix_at: Fraction = 0.7,
        tolerance: PositiveFloat = 0.01,
        update_every: PositiveInt = 1,
        strict: bool = True,
        pictures: bool = True,
        dirpath: str | Path | None = None,
    ) -> None:
        self.budget, self.dims, self.cost, self.relative, self.reference = budget, dims, cost, relative, reference
        self.network, self.example_inputs, self.exclude = network, example_inputs, exclude
        self.weight, self.lr, self.fix_at, self.tolerance = weight, lr, fix_at, tolerance
        self.update_every, self.strict, self.pictures, self.dirpath = update_every, strict, pictures, dirpath
        self._module: pl.LightningModule | None = None
        self._architecture: Architecture | None = None
        self._budget: Budget | None = None
        self._search: Search | None = None
        self._optimizers: OptimizersWithoutSizes | None = None
        self._streams = SavedStreams()
        self._total = float("inf")  # steps of the fit
        self._loaded: dict[str, Any] = {}
        if dims is not None and not dims:
            raise ValueError("LearnableArchitecture: dims=(): name at least one size to learn, or give None for all.")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the callback, or a pickle of it, takes along: no module, nor what was done to one."""
        kept = without_module(self.__dict__)
        of_a_fit = ("_module", "_architecture", "_budget", "_search", "_optimizers")
        return {**kept, **dict.fromkeys(of_a_fit), "_loaded": {}}

    # --- what a run has found ---

    @property
    def architecture(self) -> Architecture:
        """The sizes, and the layers that they crop.

        Raises:
            RuntimeError: before the first fit.
        """
        if self._architecture is None:
            raise RuntimeError("LearnableArchitecture has no network yet: it finds its sizes when a fit starts.")
        return self._architecture

    @property
    def search(self) -> Search:
        """The state of the search.

        Raises:
            RuntimeError: before the first fit.
        """
        if self._search is None:
            raise RuntimeError("LearnableArchitecture has no network yet: it finds its sizes when a fit starts.")
        return self._search

    @property
    def sizes(self) -> dict[str, int]:
        """The current crop of each size, by name."""
        return self.architecture.sizes()

    @property
    def cost_over_budget(self) -> float:
        """The network's current cost, divided by the budget."""
        return self.search.over_budget

    def settings(self) -> dict[str, Any]:
        """Return the arguments as plain values for loggers."""
        return settings_of(self, Callback)

    def export(self) -> ExportedNetwork:
        """Return a plain network of the current sizes, with masks multiplied into its weights.

        Raises:
            RuntimeError: before the first fit, or if the outputs of the plain and the masked network differ.
        """
        return export(self.architecture)

    def undo(self) -> None:
        """Restore the network's full sizes, with its current weights; this changes its output."""
        if self._architecture is not None:
            self._architecture.remove()
            self._architecture.manage(managed=False)
        if self._module is not None:
            self._module._modules.pop(NAME, None)
        if self._optimizers is not None:
            self._optimizers.remove()
        self._module = self._architecture = self._budget = self._search = self._optimizers = None

    # --- one fit ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse unsupported settings, find the sizes, and crop the layers, before optimizers are created."""
        check_attributes(self)  # which may have been set since
        check_whole_parameters("LearnableArchitecture", trainer, "strategy='ddp'")
        check_companions(trainer, self)
        if stage == "fit":
            check_optimization(pl_module)
        if self._module is not None and self._module is not pl_module:
            self.undo()
        if self._module is None:
            self._open(trainer, pl_module)
        if stage == "fit":
            self._optimizers = OptimizersWithoutSizes(pl_module, self.search.parameters)

    def _open(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if NAME in module._modules:
            raise MisconfigurationException(
                "LearnableArchitecture: another callback owns the sizes of this module already. Call undo() of that "
                "one, or export() and search in the export."
            )
        network = network_of(module, self.network)
        call = example_call(trainer, module, network, self.example_inputs)
        patterns = [self.exclude] if isinstance(self.exclude, str) else list(self.exclude or ())
        architecture = Architecture(network, call, self.dims, patterns)
        self._check_found(architecture)
        self._budget = budget = make_budget(
            trainer, architecture, self.cost, self.budget, self.relative, self.reference
        )
        architecture.install()
        module.add_module(NAME, architecture)
        self._module, self._architecture = module, architecture
        self._search = Search(
            architecture,
            budget.cost,
            budget.target,
            weight=self.weight,
            lr=self.lr,
            tolerance=self.tolerance,
            update_every=self.update_every,
        )
        kinds = [f"{sum(1 for _ in architecture.of(d))} of {d}" for d in ("width", "depth", "kernel", "resolution")]
        rank_zero_info(
            f"LearnableArchitecture: {len(architecture.axes)} sizes ({', '.join(kinds)}); budget {budget.target:.4g} "
            f"of {budget.cost.full:.4g} {'parameters' if self.cost == 'params' else 'multiply-accumulates'}."
        )

    def _check_found(self, architecture: Architecture) -> None:
        if architecture.fixed:
            said = "; ".join(f"{name} ({why})" for name, why in list(architecture.fixed.items())[:5])
            if self.strict:
                raise MisconfigurationException(
                    f"LearnableArchitecture: the width of some layers cannot be learned: {said}. Pass strict=False to "
                    "leave them as they are, or name them in exclude=."
                )
            rank_zero_warn(f"LearnableArchitecture leaves the width of some layers as it is: {said}.")
        missing = architecture.missing()
        if missing or not architecture.axes:
            cures = {
                "width": "layers with units of their own",
                "depth": "lists of residual blocks, whose output is their input once their last layers are zero",
                "kernel": "ContinuousConv, or convolutions of odd size whose padding keeps the sides",
                "resolution": "FrequencyCrop layers (CCNN has them)",
            }
            wanted = "; ".join(f"{d!r} needs {cures[d]}" for d in missing or DIMENSIONS)
            raise MisconfigurationException(
                f"LearnableArchitecture(dims={self.dims}): {type(architecture.network).__name__} has no size of the "
                f"kind: {wanted}. Leave it out of dims, or change the network."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the random streams and sizes of a checkpoint."""
        self._streams.watch(pl_module.device)
        self._streams.on_fit_start(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the length of the fit, and log the settings."""
        self._total = float(trainer.estimated_stepping_batches)
        if not self.search.history:
            self.search.note(trainer.global_step)
        log_settings(trainer, pl_module, {"bpfree_architecture": self.settings()})

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the random streams of a checkpoint inside an epoch."""
        self._streams.on_train_batch_start(trainer, batch_idx)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Add the budget's gradient, and update the sizes, once per step for any number of micro-batches."""
        search = self.search
        if not search.fixed and search.steps >= self.fix_at * self._total:
            self._fix()
        if not search.fixed and search.steps == 0 and len(search.without_gradient()) == len(search.parameters):
            raise MisconfigurationException(
                "LearnableArchitecture: no gradient of the loss reaches the sizes. Let the training rule train them "
                f"(params= must match '{NAME}.*'), and let training_step call the network that has them."
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        left = 1.0 if self._total == float("inf") else 1 - search.steps / max(self.fix_at * self._total, 1)
        search.step(1.0 if scaler is None else float(scaler.get_scale()), max(left, 0.0))

    def _fix(self) -> None:
        found = self.cost_over_budget
        fits = self.search.fix()
        if abs(found - 1) > _FAR:
            rank_zero_info(
                f"LearnableArchitecture: the search reached {found:.2f} of the budget; the rest is met by one factor "
                "on all sizes. A longer search (fix_at=) or a larger lr= leaves more of it to the gradient."
            )
        if not fits:
            rank_zero_warn(
                f"LearnableArchitecture: sizes are fixed at {self.cost_over_budget:.4f} of the budget; no single step "
                f"of a size brings it within tolerance={self.tolerance}: sizes are too coarse for it."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the sizes for the picture, and log them when the Trainer logs."""
        search = self.search
        every = max(1, int(self._total) // 200) if self._total != float("inf") else 50
        if trainer.global_step % every == 0 and search.history[-1]["step"] != trainer.global_step:
            search.note(trainer.global_step)
        if is_log_due(trainer):
            values = {f"bpfree/architecture/{name}": float(crop) for name, crop in self.sizes.items()}
            values["bpfree/architecture/cost_over_budget"] = search.over_budget
            values["bpfree/architecture/collapsed"] = float(sum(search.collapsed.values()))
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure again if the budget is in seconds."""
        budget = self._budget
        if budget is None or budget.seconds is None or self.search.fixed:
            return
        architecture, cost = self.architecture, budget.cost
        now = float(trainer.strategy.broadcast(seconds(architecture.network, architecture.call)))
        # The constant part stays, and the line goes through the network of now.
        slope = max(now - budget.constant, 0.01 * now) / cost.number()
        target = (budget.seconds - budget.constant) / slope
        low = cost.at(architecture.axes, smallest=True)
        self.search.target = min(max(target, low), cost.at(architecture.axes, smallest=False))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the sizes if they are not fixed yet, and draw the architecture over training."""
        search = self.search
        if not search.fixed:
            if self._total != float("inf") and trainer.global_step < self.fix_at * self._total:
                rank_zero_warn(
                    "LearnableArchitecture: the fit ended before the sizes were fixed; they are fixed now, and the "
                    "weights have not trained with them. Let the fit go on, or lower fix_at."
                )
            self._fix()
        search.note(trainer.global_step)
        if self.pictures and trainer.is_global_zero:
            fixed_at = int(self.fix_at * self._total) if self._total != float("inf") else None
            folder = Path(self.dirpath or Path(trainer.default_root_dir) / "architecture")
            picture = architecture_picture(search.history, fixed_at)
            show(picture, "architecture", trainer.global_step, folder=folder, loggers=trainer.loggers)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module's own ``configure_optimizers``."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the module's own ``configure_optimizers``: Lightning calls no teardown after an exception."""
        self._restore()

    def _restore(self) -> None:
        if self._optimizers is not None:
            self._optimizers.remove()
        self._optimizers = None

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return the sizes, their optimizer, the search so far, and the random streams."""
        search = {} if self._search is None else self._search.state_dict()
        return {"search": search, "streams": self._streams.to_plain()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the sizes of a checkpoint."""
        self._streams.take(state_dict.get("streams", []))
        if state_dict.get("search"):
            self.search.load_state_dict(state_dict["search"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the random streams of the other ranks."""
        own = checkpoint["callbacks"][self.state_key]
        own["streams"] = self._streams.of_all_ranks(trainer, own["streams"])
