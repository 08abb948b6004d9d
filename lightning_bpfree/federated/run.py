"""The state of a run (rows of numbers, evaluation, checkpoints), the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveInt, check_arguments
from lightning_bpfree.federated.evaluation import Evaluation
from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.messages import Instructions, Reply
from lightning_bpfree.federated.server import RoundReport

Row = dict[str, Any]


class Run:
    """The server's side of a run, independent of the transport.

    Args:
        module: any LightningModule; it holds the server's weights.
        datamodule: the server evaluates on its validation set.
        federation: the settings.
        rounds: number of rounds of the whole run, at least 1.
        evaluate_every: rounds between two evaluations, with one more after the last round; 0 for none.

    Raises:
        ValueError: before the first round, for a module that cannot be used.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        federation: Federation,
        rounds: PositiveInt = 100,
        *,
        evaluate_every: NonNegativeInt = 1,
    ) -> None:
        check_arguments(Run, locals())
        self.module, self.federation, self.rounds, self.evaluate_every = module, federation, rounds, evaluate_every
        self.server = federation.server(module)
        self.noise = 0.0 if federation.privacy is None else federation.privacy.multiplier(rounds)
        self.evaluation = Evaluation(module, datamodule) if evaluate_every else None
        self.history: list[Row] = []
        self._multipliers: list[float] = []

    def record(
        self, report: RoundReport, told: Sequence[Instructions], replies: Sequence[Reply], seconds: float
    ) -> Row:
        """Add a row for a finished round, and return it.

        Args:
            report: the report of the round.
            told: the instructions to its clients.
            replies: all answers, including late and invalid ones.
            seconds: duration of the round.
        """
        before = self.history[-1] if self.history else {}
        peaks = [reply.peak_mib for reply in replies if reply.peak_mib is not None]
        row: Row = {
            "round": report.round,
            "clients": len(report.used),
            "left_out": len(told) - len(report.used),
            "grad_norm": report.grad_norm,
            "bytes_up": max((reply.num_bytes for reply in replies), default=0),
            "bytes_down": max((instructions.num_bytes for instructions in told), default=0),
            "forward_passes": before.get("forward_passes", 0.0) + sum(reply.forward_passes for reply in replies),
            "client_peak_mib": max(peaks) if peaks else None,
            "seconds": seconds,
            **self._privacy_of(report),
        }
        if self.evaluation is not None and (report.round % self.evaluate_every == 0 or report.round == self.rounds):
            row.update(self.evaluation("validate", self.server.evaluated()))
        self.history.append(row)
        return row

    def _privacy_of(self, report: RoundReport) -> Row:
        privacy = self.federation.privacy
        if privacy is None:
            return {}
        # A client adds its share of the noise; where clients are missing, so is theirs.
        own = self.noise * (len(report.used) / self.federation.in_a_round) ** 0.5
        self._multipliers += [own] if own else []
        return {"epsilon": privacy.spent(self._multipliers)}

    def test(self) -> dict[str, float]:
        """Return the metrics of the module's test step, at the average of the weights if there is one."""
        if self.evaluation is None:
            raise ValueError("evaluate_every=0: give 1 or more, to evaluate at all.")
        return self.evaluation("test", self.server.evaluated())

    # --- checkpoints ---

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically; it contains only tensors, numbers and strings."""
        temporary = path.with_name(f"{path.name}.tmp")
        torch.save(self.state_dict(), temporary)
        temporary.replace(path)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume."""
        return {
            "server": self.server.state_dict(),
            "federation": self.federation.to_plain(),
            "rounds": self.rounds,
            "history": self.history,
            "multipliers": self._multipliers,
        }

    def load(self, path: Path) -> None:
        """Resume from a checkpoint; only tensors, numbers and strings are read.

        Raises:
            ValueError: if the checkpoint has other settings.
        """
        self.load_state_dict(torch.load(path, weights_only=True), str(path))

    def load_state_dict(self, state: dict[str, Any], name: str = "a state") -> None:
        """Restore what :meth:`state_dict` returned."""
        was, now = state["federation"], self.federation.to_plain()
        different = sorted(key for key in now if was.get(key) != now[key])
        if self.federation.privacy is not None and state["rounds"] != self.rounds:
            different.append("rounds")
        if different:
            raise ValueError(
                f"resume={name}: it was made with other settings of {', '.join(different)}: resume with those, or "
                "start anew in another folder."
            )
        self.server.load_state_dict(state["server"])
        self.history, self._multipliers = list(state["history"]), list(state["multipliers"])
