"""Concepts in a network: how well layers represent them, whether the output uses them, and how inputs show them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_bpfree.core.arguments import NonNegativeFloat, Patterns, PositiveInt, checked
from lightning_bpfree.methods.concept_backprop.change import ChangeSettings, PerSample
from lightning_bpfree.methods.concept_backprop.concepts import Concept, LabelFunction, as_concepts
from lightning_bpfree.methods.concept_backprop.detection import Inputs, Samples, collect_activations
from lightning_bpfree.methods.concept_backprop.frozen import Forward
from lightning_bpfree.methods.concept_backprop.generators import untouched_generators
from lightning_bpfree.methods.concept_backprop.layers import find_layers
from lightning_bpfree.methods.concept_backprop.parameterizations import Parameterization
from lightning_bpfree.methods.concept_backprop.pictures import change_picture, detection_picture, emergence_picture
from lightning_bpfree.methods.concept_backprop.probe import ProbeSettings
from lightning_bpfree.methods.concept_backprop.ranks import gathered
from lightning_bpfree.methods.concept_backprop.report import Plan, Report, report_on
from lightning_bpfree.training.shown_pictures import show
from lightning_bpfree.training.trainer_attributes import is_dry_run


class ConceptBackprop(Callback):
    """Finds concepts in the layers of a network, and changes inputs until a layer shows a concept.

    1. Linear probes learn to predict each concept from the frozen activations of each layer, in one pass over the
       data. Their scores on held-out samples are compared with those of random labels.
    2. Activations are moved along each concept. If the output changes, the network uses the concept; otherwise the
       concept can only be decoded from the layer.
    3. Inputs without a concept are changed, as little as possible, until its probe detects it; the difference shows
       what the probe reads. The concept's entanglement is the change of the other probes' scores and of the output.

    As a callback, it fits probes before the first batch, after every ``every_n_epochs`` epochs and at the end, and
    changes inputs and draws pictures at the end; ``trainer.validate`` and ``trainer.test`` do all of it. It works with
    any training rule, also in Lightning's inference mode, and leaves parameters, buffers, gradients and random streams
    unchanged, bit for bit. Without a Trainer, use :meth:`analyze`.

    Scores are logged as ``bpfree/concept/<concept>/<layer>/score``, ``.../control`` (random labels), ``.../effect``
    (change of the output, in its standard deviations) and ``.../effect_ratio`` (over that of random directions). For
    changed inputs: ``bpfree/concept/<concept>/after``, ``.../reached``, ``.../distance_l2``, ``.../entangled_with/*``.

    Args:
        concepts: one or several :class:`Concept`; or a mapping from names to functions ``(inputs, targets) -> labels``
            or to keys of the batch.
        layers: names or shell-style patterns of submodules.
        every_n_epochs: epochs between measurements during a fit, >= 1; None measures only at its end.
        data: ``"val"`` or ``"train"``: the Trainer's loader; or a data loader, or a list of batches. Use data that the
            network was not trained on, to measure generalization instead of memorization.
        inputs: key, position or function that selects the network's inputs from a batch; None for the first part of a
            pair.
        forward: how the network is evaluated: None for ``module(inputs)``, name of a submodule, or a function.
        max_samples: maximum number of samples over all ranks; None for all.
        probe: how probes are fitted.
        change: settings for changed inputs; None changes no inputs.
        parameterization: how inputs may change: ``AdditiveChange``, ``GridChange``, ``LatentChange``,
            ``CategoryChange`` or ``TokenChange``; None for ``AdditiveChange()``.
        validity: differentiable cost of unrealistic inputs, ``(B, ...) -> (B,)``, which the search adds to its
            penalties; None for none.
        validity_weight: weight of that cost, >= 0.
        legal: function that returns which inputs are legal, ``(B, ...) -> (B,)`` of booleans: only legal changes count
            as reached.
        change_layer: layer whose probes determine the changed inputs; None uses the layer with the best score.
        num_inputs: inputs that are changed for each concept, >= 1.
        sensitivity: whether to measure if concepts are used; needs the module's output.
        pictures: whether to draw pictures, which needs matplotlib; they go to ``dirpath``, W&B and TensorBoard.
        dirpath: folder for pictures; None uses ``concepts`` in the Trainer's ``default_root_dir``.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> x = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
        >>> concepts = ConceptBackprop({"first": lambda x, y: x[:, 0] > 0.5}, layers="1", change=None)
        >>> report = concepts.analyze(net, [(x, x.sum(1))])
        >>> report.detections["first", "1"].score > 0.7
        True

    References:
        P. Hammersborg, I. Strümke, "Concept backpropagation: An Explainable AI approach for visualizing learned
        concepts in neural network models", 2023, arXiv 2307.12601. B. Kim et al., "Interpretability Beyond Feature
        Attribution: Quantitative Testing with Concept Activation Vectors (TCAV)", 2018, arXiv 1711.11279.
    """

    citation: ClassVar[str] = (
        "@article{hammersborg2023concept, title={Concept backpropagation: An Explainable AI approach for visualizing "
        'learned concepts in neural network models}, author={Hammersborg, Patrik and Str{\\"u}mke, Inga}, '
        "journal={arXiv preprint arXiv:2307.12601}, year={2023}}"
    )

    logged: ClassVar[dict[str, str]] = {
        "bpfree/concept/<concept>/<layer>/score": "score of the linear probe of the concept in the layer",
        "bpfree/concept/<concept>/<layer>/control": "score of the same probe trained on random labels",
        "bpfree/concept/<concept>/<layer>/effect": "effect of the concept on the output of the module",
        "bpfree/concept/<concept>/<layer>/effect_ratio": "this effect in units of that of random directions",
        "bpfree/concept/<concept>/before": "mean probability of the concept before the change of the inputs",
        "bpfree/concept/<concept>/after": "mean probability of the concept after the change of the inputs",
        "bpfree/concept/<concept>/reached": "share of the samples for which the change reached its target",
        "bpfree/concept/<concept>/distance_l2": "mean L2 norm of the change",
        "bpfree/concept/<concept>/entangled_with/<other>": "change of another concept by the same change of inputs",
    }

    @checked
    def __init__(
        self,
        concepts: Concept | Sequence[Concept] | Mapping[str, LabelFunction | str],
        layers: Patterns,
        *,
        every_n_epochs: PositiveInt | None = 1,
        # plain: jsonargparse makes no object of a class in brackets
        data: Literal["val", "train"] | DataLoader | Iterable[Any] = "val",  # type: ignore[type-arg]
        inputs: Inputs = None,
        forward: Forward = None,
        max_samples: PositiveInt | None = 2000,
        probe: ProbeSettings | None = None,
        change: ChangeSettings | None = ChangeSettings(),  # noqa: B008  # frozen
        parameterization: Parameterization | None = None,
        validity: PerSample | None = None,
        validity_weight: NonNegativeFloat = 1.0,
        legal: PerSample | None = None,
        change_layer: str | None = None,
        num_inputs: PositiveInt = 64,
        sensitivity: bool = True,
        pictures: bool = True,
        dirpath: str | Path | None = None,
    ) -> None:
        self.concepts, self.layers = as_concepts(concepts), layers
        self.every_n_epochs, self.data, self.inputs, self.max_samples = every_n_epochs, data, inputs, max_samples
        self.pictures, self.dirpath = pictures, dirpath
        self.plan = Plan(
            probe=probe or ProbeSettings(),
            change=change,
            parameterization=parameterization,
            layer=change_layer,
            num_inputs=num_inputs,
            sensitivity=sensitivity,
            forward=forward,
            validity=validity,
            validity_weight=validity_weight,
            legal=legal,
        )
        self.report: Report | None = None
        self.history: list[dict[str, Any]] = []
        self._measured_epoch, self._epochs = -1, 0

    # --- without a Trainer ---

    def analyze(self, module: nn.Module, batches: Iterable[Any]) -> Report:
        """Return probes, sensitivities and changed inputs for a trained module; also kept as ``report``.

        Args:
            module: any module; it is not modified.
            batches: a data loader, or a list of batches.

        Raises:
            ValueError: for invalid layers, concepts or inputs; the message says how to fix it.
        """
        self.report = report_on(module, self._collect(module, batches), self.concepts, self.plan)
        return self.report

    def _collect(self, module: nn.Module, loaders: Any, trainer: pl.Trainer | None = None) -> Samples:
        with untouched_generators(loaders), contextlib.closing(_batches(loaders, trainer)) as batches:
            samples = collect_activations(
                module,
                batches,
                self.layers,
                self.concepts,
                pool=self.plan.probe.pool,
                inputs=self.inputs,
                forward=self.plan.forward,
                max_samples=_share(self.max_samples, trainer),
            )
        return samples if trainer is None else gathered(samples, trainer.world_size)

    # --- with a Trainer ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse layers that do not exist, before training."""
        find_layers(pl_module, self.layers)
        if stage == "fit":  # a checkpoint brings its own, after this
            self.history, self._measured_epoch, self._epochs = [], -1, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure before training, after all loaders and states are set up."""
        if self.every_n_epochs is not None and trainer.current_epoch == 0 and not self.history:
            self._measure(trainer, pl_module, epoch=0)
            # self.log would mix these with the values of the first epoch
            for logger in trainer.loggers:
                logger.log_metrics(self._last().metrics(), step=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure again if due, and log."""
        self._epochs = trainer.current_epoch + 1
        if self.every_n_epochs is not None and self._epochs % self.every_n_epochs == 0:
            self._measure(trainer, pl_module, self._epochs)
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change inputs, and draw all pictures."""
        self._full(trainer, pl_module, self._loaders(trainer))
        if self._measured_epoch != self._epochs:
            self._remember(self._epochs)
        for logger in trainer.loggers:
            logger.log_metrics(self._last().metrics(), step=trainer.global_step)
        self._draw(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do everything in ``trainer.validate``; Lightning is in inference mode here."""
        if trainer.state.fn == "validate":
            self._full(trainer, pl_module, self._loaders(trainer, trainer.val_dataloaders))
            self._log(trainer, pl_module)
            self._draw(trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do everything in ``trainer.test``, on its data."""
        self._full(trainer, pl_module, self._loaders(trainer, trainer.test_dataloaders))
        self._log(trainer, pl_module)
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores so far."""
        return {"history": self.history, "measured_epoch": self._measured_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores of a checkpoint."""
        self.history, self._measured_epoch = list(state_dict["history"]), state_dict["measured_epoch"]

    def _full(self, trainer: pl.Trainer, module: pl.LightningModule, loaders: Any) -> None:
        self.report = report_on(module, self._collect(module, loaders, trainer), self.concepts, self.plan)

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        samples = self._collect(module, self._loaders(trainer), trainer)
        plan = dataclasses.replace(self.plan, change=None)
        self.report = report_on(module, samples, self.concepts, plan)
        self._remember(epoch)

    def _remember(self, epoch: int) -> None:
        self.history.append({"epoch": epoch, "scores": self._last().scores()})
        self._measured_epoch = epoch

    def _last(self) -> Report:
        assert self.report is not None
        return self.report

    def _loaders(self, trainer: pl.Trainer, evaluated: Any = None) -> Any:
        """Return the data to look at: that of the user, or of the Trainer, in an evaluation that which is evaluated."""
        if not isinstance(self.data, str):
            return self.data
        loaders = evaluated or (trainer.val_dataloaders if self.data == "val" else trainer.train_dataloader)
        if loaders is None or not tree_leaves(loaders):
            raise MisconfigurationException(
                f"ConceptBackprop(data={self.data!r}): the Trainer has no such data loader in this fit. Give "
                "data='train', a data loader of your own, or validation data."
            )
        return loaders

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.barebones:
            several = trainer.world_size > 1
            module.log_dict(self._last().metrics(), on_step=False, on_epoch=True, sync_dist=several, batch_size=1)

    def _draw(self, trainer: pl.Trainer) -> None:
        report = self._last()
        if not self.pictures or not trainer.is_global_zero or is_dry_run(trainer):
            return
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "concepts")
        drawn = {"concepts/layers": detection_picture(report.detections)}
        if len(self.history) > 1:
            drawn["concepts/epochs"] = emergence_picture(self.history)
        drawn |= {f"concepts/changed_{name}": change_picture(change) for name, change in report.changes.items()}
        for name, figure in drawn.items():
            show(figure, name, trainer.global_step, folder=folder, loggers=trainer.loggers)


def _share(samples: int | None, trainer: pl.Trainer | None) -> int | None:
    """Return how many samples one rank looks at."""
    return samples if samples is None or trainer is None else math.ceil(samples / trainer.world_size)


def _batches(loaders: Any, trainer: pl.Trainer | None) -> Generator[Any, None, None]:
    """Yield batches, with a Trainer as the module's steps get them: on its device, in its precision."""
    several = isinstance(loaders, list | tuple) and all(isinstance(part, DataLoader) for part in loaders)
    for loader in loaders if several else [loaders]:
        for batch in loader:
            if trainer is None:
                yield batch
            else:
                yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
