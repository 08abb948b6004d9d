"""The server of a federation as a Flower app."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.flower.records import array_record
from lightning_bpfree.federated.flower.strategy import BaffleStrategy
from lightning_bpfree.federated.run import Row, Run

CHECKPOINT = "federation.ckpt"


def server_app(
    module: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    federation: Federation,
    rounds: int = 100,
    *,
    folder: str | Path | None = None,
    save_every: int = 1,
    timeout: float = 60.0,
    wait: float = 120.0,
) -> ServerApp:
    """Return a ServerApp that trains ``module`` for a number of rounds.

    Args:
        module: any LightningModule without BatchNorm; it holds the weights.
        datamodule: the server evaluates on its validation set.
        federation: the settings, equal to the clients'.
        rounds: number of rounds of the whole run.
        folder: where the checkpoint is saved; an existing one is resumed from. None neither saves nor resumes.
        save_every: rounds between two checkpoints.
        timeout: seconds that a round waits for answers.
        wait: seconds to wait for nodes at the start.

    Examples:
        >>> from lightning_bpfree.demos.data import DigitsDataModule
        >>> from lightning_bpfree.demos.modules import MLP, Classifier
        >>> type(server_app(Classifier(MLP(64, [8], 10)), DigitsDataModule(), Federation())).__name__
        'ServerApp'
    """

    def run_of(_: Context) -> Run:
        return Run(module, datamodule, federation, rounds)

    return server_app_from(run_of, folder=folder, save_every=save_every, timeout=timeout, wait=wait)


def server_app_from(
    run_of: Callable[[Context], Run],
    each: Callable[[Run, Row], None] | None = None,
    *,
    folder: str | Path | None = None,
    save_every: int = 1,
    timeout: float = 60.0,
    wait: float = 120.0,
    of_context: Callable[[Context], dict[str, Any]] | None = None,
) -> ServerApp:
    """Return a ServerApp whose run is created in the server's process.

    Args:
        run_of: returns the run, given its context.
        each: called with the run and the row of every round.
        folder: see :func:`server_app`.
        save_every: see :func:`server_app`.
        timeout: see :func:`server_app`.
        wait: see :func:`server_app`.
        of_context: returns overrides of these settings, given the context of the run.
    """
    app: Any = ServerApp()
    given = {"folder": folder, "save_every": save_every, "timeout": timeout, "wait": wait}

    @app.main()  # type: ignore[untyped-decorator]  # of an untyped app
    def main(grid: Grid, context: Context) -> None:
        own: dict[str, Any] = {**given, **(of_context(context) if of_context else {})}
        run = run_of(context)
        path = None if own["folder"] is None else Path(own["folder"]) / CHECKPOINT
        if path is not None and path.exists():
            run.load(path)

        def finished(row: Row) -> None:
            if path is not None and (row["round"] % own["save_every"] == 0 or row["round"] == run.rounds):
                run.save(path)
            if each is not None:
                each(run, row)

        left = run.rounds - run.server.round
        if left > 0:
            strategy = BaffleStrategy(run, finished, timeout=own["timeout"], wait=own["wait"])
            strategy.start(grid, array_record(run.server.params), num_rounds=left, timeout=own["timeout"])

    return app  # type: ignore[no-any-return]
