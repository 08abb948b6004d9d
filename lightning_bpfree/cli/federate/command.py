"""``bpfree federate``: options, progress, loggers, and the files of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.checkpoints import check_written
from lightning_bpfree.cli.common.preconditions import CommandError, nearest, require, require_writable
from lightning_bpfree.cli.common.records import finite, provenance, write_csv, write_json
from lightning_bpfree.cli.common.tables import console, number
from lightning_bpfree.cli.federate.configured import Configured, configured
from lightning_bpfree.cli.federate.engines import ENGINES, Job
from lightning_bpfree.cli.federate.options import parser
from lightning_bpfree.federated.run import Row, Run
from lightning_bpfree.training.quiet_lightning import quiet_lightning

if TYPE_CHECKING:
    from rich.progress import Progress


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree federate``."""
    options, overrides = parser().parse_known_args(arguments)
    require("rich")
    if options.engine not in ENGINES:
        raise CommandError(
            f"--engine: no such engine{nearest(options.engine, list(ENGINES))} Choose {', '.join(ENGINES)}."
        )
    for name in ("save_every", "timeout", "nodes"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise CommandError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a positive number.")
    args = [*recipes.config_arguments([str(Path(f).absolute()) if Path(f).exists() else f for f in options.config])]
    args += overrides
    try:
        return _run(options, args, arguments)
    except (ValueError, ModuleNotFoundError) as error:
        if not str(error):
            raise
        raise CommandError(str(error)) from error


def _run(options: argparse.Namespace, args: list[str], arguments: Sequence[str]) -> int:
    with quiet_lightning():
        made = configured(args)
    folder: Path = options.out.absolute()
    require_writable(folder, "--out DIR")
    job = Job(
        made,
        args,
        folder,
        save_every=options.save_every,
        resume=options.resume,
        timeout=options.timeout,
        nodes=options.nodes,
        port=options.port,
        tls=options.tls,
    )
    if options.resume and not job.checkpoint.exists():
        raise CommandError(
            f"--resume: there is no checkpoint {job.checkpoint}: leave out --resume, or give its --out DIR."
        )
    if options.resume:
        check_written(job.checkpoint, "--resume", "federation", ("a federation", "bpfree federate"))
    else:
        _make_room(folder, options.overwrite)
    history: list[Row] = []
    with _progress() as bar:
        task = bar.add_task("rounds", total=made.rounds)

        def each(_: Run | None, row: Row) -> None:
            history.append(row)
            bar.update(task, completed=row["round"], description=_said(row))
            _log(made, row)
            if _ is not None:
                _write(_.history, folder)

        test = ENGINES[options.engine](job, each)
    for logger in made.loggers:
        logger.log_metrics({f"test/{name}": value for name, value in test.items()}, made.rounds)
        logger.finalize("success")
    result = {**provenance("federate", arguments), "engine": options.engine, "rounds": made.rounds}
    result |= {"federation": made.federation.to_plain(), "config": made.config, "test": test, "history": history}
    write_json(finite(result), folder / "result.json")
    _show(made, history, test, folder)
    return 0


def _make_room(folder: Path, overwrite: bool) -> None:
    earlier = [folder / name for name in ("federation.ckpt", "rounds.csv", "test.json", "result.json")]
    if any(file.exists() for file in earlier) and not overwrite:
        raise CommandError(
            f"--out {folder} holds an earlier federation. Pass --resume to continue it, --overwrite to replace it, or "
            "give another --out."
        )
    for file in earlier:
        file.unlink(missing_ok=True)


def _write(history: list[Row], folder: Path) -> None:
    fields = list(dict.fromkeys(name for row in history for name in row))
    write_csv(fields, history, folder / "rounds.csv")


def _log(made: Configured, row: Row) -> None:
    own = {name: float(value) for name, value in row.items() if isinstance(value, int | float) and name != "round"}
    named = {name if name.startswith("val") else f"federation/{name}": value for name, value in own.items()}
    for logger in made.loggers:
        logger.log_metrics(named, int(row["round"]))
        logger.save()


def _said(row: Row) -> str:
    metrics = [f"{name} {number(value)}" for name, value in row.items() if name.startswith("val")]
    return ", ".join(["rounds", *metrics])


def _progress() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    texts = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*texts, TimeElapsedColumn(), TimeRemainingColumn(), console=console())


def _show(made: Configured, history: list[Row], test: dict[str, float], folder: Path) -> None:
    from rich.table import Table

    last: dict[str, Any] = history[-1] if history else {}
    table = Table(title=f"{type(made.federation.method).__name__}, {made.federation.num_clients} clients")
    table.add_column("what")
    table.add_column("number", justify="right")
    for name, value in {**{f"test: {k}": v for k, v in test.items()}, **last}.items():
        table.add_row(name, number(float(value), 4) if isinstance(value, int | float) else "-")
    console().print(table)
    for name in ("rounds.csv", "result.json", "federation.ckpt"):
        console().print(str(folder / name), soft_wrap=True, highlight=False, markup=False)
