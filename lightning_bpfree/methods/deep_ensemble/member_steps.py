"""Shared state of both routes of a training step: the module, its members, and the current member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_bpfree.methods.deep_ensemble.captured_log import CapturedLog
from lightning_bpfree.methods.deep_ensemble.members import Members
from lightning_bpfree.methods.deep_ensemble.streams import MemberStreams
from lightning_bpfree.methods.deep_ensemble.vectorized.per_member import AtWork

Step = Callable[..., Any]


@dataclass(eq=False)
class MemberSteps:
    """Base of the routes by which all members evaluate a training step.

    Args:
        module: the module.
        members: its members.
        streams: their random streams.
        log: hears what the step logs.
        at_work: who is computing.
        own_batches: whether each member has its own batch (the batch is then a list of M).
    """

    module: nn.Module
    members: Members
    streams: MemberStreams
    log: CapturedLog
    at_work: AtWork
    own_batches: bool = False

    def __post_init__(self) -> None:
        """Start without an output of the first member."""
        self.first_output: Any = None
