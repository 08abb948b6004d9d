"""The parts of a module that every step of a rule needs."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torchmetrics

from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.replay import Attributes, Buffers, RandomStreams
from lightning_bpfree.rules.quiet import Metrics, Quiet


class View:
    """The parts of a module that every step needs; collected once an epoch, for walking a large module takes time."""

    def __init__(self, module: pl.LightningModule, params: str | Sequence[str] | None) -> None:
        self.slots = ParameterSlots(module, params)
        self.buffers, self.metrics, self.quiet = Buffers(module), Metrics(module), Quiet(module)
        self.streams = RandomStreams([module.device])
        self.attributes = Attributes(part for part in module.modules() if not isinstance(part, torchmetrics.Metric))
