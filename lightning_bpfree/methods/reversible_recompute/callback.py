"""Training without stored activations: reversible stacks in any LightningModule."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_bpfree.core.arguments import (
    NonNegativeInt,
    Patterns,
    PositiveFloat,
    PositiveInt,
    check_attributes,
    checked,
)
from lightning_bpfree.methods.reversible_recompute.conversion import (
    Scale,
    convert_to_reversible,
    convertible,
)
from lightning_bpfree.methods.reversible_recompute.conversion_report import Conversion
from lightning_bpfree.methods.reversible_recompute.families.base import Rewire
from lightning_bpfree.methods.reversible_recompute.layer_stack import ReversibleLayers
from lightning_bpfree.methods.reversible_recompute.recomputation import Schedule
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential
from lightning_bpfree.methods.reversible_recompute.stream_fusion import FusionOfOneWidth
from lightning_bpfree.training.checks import check_whole_parameters
from lightning_bpfree.training.logging_of_rules import log_settings
from lightning_bpfree.training.measurement.throughput import Throughput
from lightning_bpfree.training.refusal import refusing
from lightning_bpfree.training.saved_streams import SavedStreams
from lightning_bpfree.training.trainer_attributes import log_every_n_steps, without_module

Stack = ReversibleSequential | ReversibleLayers


class ReversibleRecompute(Callback):
    """Makes stacks of layers reversible, and recomputes their activations in the backward pass instead of storing them.

    Gradients equal those of plain autograd up to rounding: the training rule does not change, only how activations are
    recovered. With ``stacks``, layers of known transformers are converted in ``setup``, which **changes the function of
    the model** and warns about it; see :func:`~lightning_bpfree.convert_to_reversible`. Without ``stacks``, the
    schedule applies to existing reversible stacks. Parameter names do not change, so checkpoints load with and without
    the conversion. A model that was trained reversibly needs the conversion for correct outputs, so it stays after the
    fit, until :meth:`undo`.

    Logs, every ``log_every_n_steps`` optimizer steps, ``bpfree/samples_per_second`` (over all ranks, data loading
    included), ``bpfree/peak_memory`` in MiB (allocated on a CUDA device; of the process on the CPU) and, if it was
    measured, ``bpfree/reconstruction_error``. On devices without CUDA, ``"parallel"`` computes the same bits on one
    stream.

    Args:
        stacks: names of lists of layers, such as ``"model.encoder.layers"``; ``"all"`` for every list of known layers;
            None to convert nothing, and use existing reversible stacks.
        schedule: ``"autograd"``, ``"checkpoint"``, ``"sequential"`` or ``"parallel"`` (PaReprop).
        rewire: for post-norm layers, ``"pre_norm"`` or ``"scaled"``.
        scale: factors of the skips, above 0; None for the default of ``rewire``.
        fusion: how two streams become one; None for the default of ``rewire``.
        buffer_every: keep the inputs of every n-th block, at least 1; ``"auto"``: chosen by the scales; None for none.
        max_error: largest allowed relative error of recovered inputs, above 0; a larger one stops training.
        check_every: measure that error in every n-th pass, at least 1.
        store_last: number of blocks at the top of each stack that keep their activations, at least 0; saves time at the
            cost of memory.

    Raises:
        ValueError: for arguments out of range.
        MisconfigurationException: in ``setup``, under a strategy that shards parameters, and if nothing is reversible.

    Examples:
        >>> callback = ReversibleRecompute(["model.encoder.layers"], schedule="parallel")
        >>> callback.schedule
        'parallel'

    References:
        T. Zhu, K. Mangalam, "PaReprop: Fast Parallelized Reversible Backpropagation", 2023, arXiv 2306.09342.
        K. Mangalam et al., "Reversible Vision Transformers", 2022, arXiv 2302.04869.
    """

    logged: ClassVar[dict[str, str]] = {
        "bpfree/samples_per_second": "training samples a second on all ranks, since the last entry",
        "bpfree/peak_memory": "peak memory of the device since the last entry, in MiB (GPU only)",
        "bpfree/reconstruction_error": "largest difference between a recomputed and the stored input of a stack",
    }

    @checked
    def __init__(
        self,
        stacks: Patterns | None = None,
        schedule: Schedule = "sequential",
        *,
        rewire: Rewire | None = None,
        scale: Scale | None = None,
        fusion: FusionOfOneWidth | None = None,
        buffer_every: PositiveInt | Literal["auto"] | None = "auto",
        max_error: PositiveFloat | None = None,
        check_every: PositiveInt = 1,
        store_last: NonNegativeInt = 0,
    ) -> None:
        self.stacks = stacks if stacks is None or stacks == "all" or not isinstance(stacks, str) else [stacks]
        self.schedule: Schedule = schedule
        self.rewire, self.scale, self.fusion, self.buffer_every = rewire, scale, fusion, buffer_every
        self.max_error, self.check_every, self.store_last = max_error, check_every, store_last
        self.conversion: Conversion | None = None
        self._module: pl.LightningModule | None = None
        self._found: list[tuple[Stack, Schedule]] = []
        self._window, self._logged_at = Throughput(), 0
        self._streams = SavedStreams()
        self._check()

    @property
    def _options(self) -> dict[str, Any]:
        names = ("rewire", "scale", "fusion", "buffer_every", "max_error", "check_every", "store_last")
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without the module and its conversion."""
        return {**without_module(self.__dict__), "conversion": None, "_module": None, "_found": []}

    def _check(self) -> None:
        unused = {"buffer_every": "auto", "check_every": 1, "store_last": 0}
        given = [f"{name}={v!r}" for name, v in self._options.items() if v != unused.get(name)]
        if self.stacks is None and given:
            raise ValueError(
                f"ReversibleRecompute: {', '.join(given)} with stacks=None, which converts nothing: stacks that are "
                "already reversible keep their own settings. Name the stacks to convert, or leave it out."
            )

    def settings(self) -> dict[str, Any]:
        """Return the arguments as plain values for loggers."""
        stacks = self.stacks if isinstance(self.stacks, str | None) else ", ".join(self.stacks)
        plain = {name: v if isinstance(v, int | float | str | None) else str(v) for name, v in self._options.items()}
        return {"stacks": stacks, "schedule": self.schedule, **plain}

    # --- conversion ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert the model at every stage, before optimizers are created and strategies wrap the module."""
        check_attributes(self)  # which may have been set since
        self._check()
        check_whole_parameters("ReversibleRecompute", trainer, "strategy='ddp'")
        if pl_module is not self._module:
            self.conversion, self._found, self._module = None, [], pl_module
        if self.conversion is None and not self._found:
            with refusing(type(self).__name__, ValueError):
                self._open(pl_module, warn=trainer.is_global_zero)
        for stack, _ in self._found:
            stack.schedule = self.schedule
        if self.schedule == "parallel" and trainer.strategy.root_device.type != "cuda":
            rank_zero_info(
                "ReversibleRecompute(schedule='parallel') on a device without CUDA: blocks are recovered and "
                "differentiated in the same order on one stream, with the same bits and no gain in time."
            )

    def _open(self, module: pl.LightningModule, warn: bool) -> None:
        there = reversible_stacks(module)
        names = self.stacks
        if names is not None:
            asked = names if names == "all" else [name for name in names if name not in there]
            if asked and not (asked == "all" and there):
                self.conversion = convert_to_reversible(module, asked, self.schedule, warn=warn, **self._options)
        elif not there:
            lists = ", ".join(map(repr, convertible(module))) or "none of known layers"
            raise MisconfigurationException(
                f"ReversibleRecompute() finds no reversible stack in {type(module).__name__}. Give stacks=[...] to "
                f"convert lists of layers (it has: {lists}), or build the module with ReversibleSequential. Layers "
                "made in configure_model come too late for this callback: call convert_to_reversible there."
            )
        wanted = reversible_stacks(module)
        if names is not None and names != "all":
            wanted = {name: stack for name, stack in wanted.items() if name in names}
        self._found = [(stack, stack.schedule) for stack in wanted.values()]
        rank_zero_info(f"ReversibleRecompute: schedule={self.schedule!r} for {', '.join(wanted)}.")

    def undo(self) -> None:
        """Restore the lists of layers, with their current weights, and the previous schedules of stacks."""
        for stack, schedule in self._found:
            stack.schedule = schedule
        if self.conversion is not None:
            self.conversion.undo()
        self.conversion, self._found, self._module = None, [], None

    # --- what it costs ---

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the random streams of a checkpoint, before the data loaders draw their sample order."""
        self._streams.watch(pl_module.device)
        self._streams.on_fit_start(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the settings."""
        self._window, self._logged_at = Throughput(), trainer.global_step
        log_settings(trainer, pl_module, {"bpfree_recompute": self.settings()})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the measurement, since validation is not training."""
        self._window = Throughput()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start measuring, if the previous measurement has ended."""
        self._streams.on_train_batch_start(trainer, batch_idx)
        if self._window.started is None:
            self._window.open(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples; log when the Trainer logs."""
        self._window.samples += _size(batch)
        every = log_every_n_steps(trainer)
        # Optimizer steps rather than batches, as loggers count: what is logged at another step does not reach them.
        if trainer.barebones or not every or trainer.global_step % every or trainer.global_step == self._logged_at:
            return
        self._logged_at = trainer.global_step
        values = self._window.close(trainer.strategy.root_device, trainer.world_size)
        errors = [stack.reconstruction_error for stack, _ in self._found]
        measured = [error for error in errors if error is not None]
        if measured:
            values["bpfree/reconstruction_error"] = max(measured)
        pl_module.log_dict(values, on_step=True, on_epoch=False)

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that determine the model's function, and the random streams."""
        return {**self._function(), "streams": self._streams.to_plain()}

    def _function(self) -> dict[str, Any]:
        settings = self.settings()
        return {name: settings[name] for name in ("stacks", "rewire", "scale", "fusion")}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the random streams of the other ranks."""
        own = checkpoint["callbacks"][self.state_key]
        own["streams"] = self._streams.of_all_ranks(trainer, own["streams"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the weights of the checkpoint belong to another function."""
        self._streams.take(state_dict.get("streams", []))
        now = self._function()
        changed = [f"{name}={state_dict[name]!r} (now {now[name]!r})" for name in now if state_dict[name] != now[name]]
        if changed:
            rank_zero_warn(
                f"The checkpoint was trained by ReversibleRecompute with {', '.join(changed)}: with other settings its "
                "weights compute a different function."
            )


def _size(batch: Any) -> int:
    """Return the first dimension of the first tensor of a batch."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors else 0


def reversible_stacks(module: nn.Module) -> dict[str, Stack]:
    """Return the outermost reversible stacks of a module by name."""
    found: dict[str, Stack] = {}
    for name, part in module.named_modules():
        if isinstance(part, ReversibleSequential | ReversibleLayers) and not any(
            name.startswith(f"{outer}.") for outer in found
        ):
            found[name] = part
    return found
