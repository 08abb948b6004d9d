"""The engines that transport a federation's messages: this process, Flower's simulation, or separate processes."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_bpfree.cli.common.preconditions import CommandError
from lightning_bpfree.cli.federate.configured import Configured, configured
from lightning_bpfree.federated.flower.needed import QUIET, need_flower
from lightning_bpfree.federated.in_process import InProcessFederation
from lightning_bpfree.federated.run import Row, Run

Each = Callable[[Run | None, Row], None]
CHECKPOINT = "federation.ckpt"
_THREADS = {"OMP_NUM_THREADS": "1"}  # several clients share a machine


class Job:
    """The settings of one run.

    Args:
        made: the objects that the configuration builds.
        arguments: the options that describe them, with paths of files.
        folder: folder of results.
        save_every: rounds between checkpoints.
        resume: whether to continue from the checkpoint in ``folder``.
        timeout: seconds that a round waits for answers.
        nodes: number of nodes that Flower starts; None for one per client.
        port: port of the SuperLink; None for a free one.
        tls: whether to create a certificate for the SuperLink and keys for the nodes.
    """

    def __init__(
        self,
        made: Configured,
        arguments: Sequence[str],
        folder: Path,
        *,
        save_every: int,
        resume: bool,
        timeout: float,
        nodes: int | None,
        port: int | None,
        tls: bool,
    ) -> None:
        self.made, self.arguments, self.folder = made, list(arguments), folder
        self.save_every, self.resume, self.timeout = save_every, resume, timeout
        self.nodes, self.port, self.tls = nodes or made.federation.num_clients, port, tls

    @property
    def checkpoint(self) -> Path:
        """The path of the checkpoint."""
        return self.folder / CHECKPOINT


def in_process(job: Job, each: Each) -> dict[str, float]:
    """Run in this process, and return the metrics of the test set."""
    made = job.made
    run = InProcessFederation(
        made.module,
        made.datamodule,
        made.federation,
        made.rounds,
        evaluate_every=made.evaluate_every,
        measure_memory=True,
    )
    if job.resume:
        run.load(job.checkpoint)

    def finished(row: Row) -> None:
        if row["round"] % job.save_every == 0 or row["round"] == run.rounds:
            run.save(job.checkpoint)
        each(run, row)

    run.fit(finished)
    return run.test() if run.evaluation else {}


def simulation(job: Job, each: Each) -> dict[str, float]:
    """Run in Flower's simulation on Ray, and return the metrics of the test set; Ray is shut down afterward."""
    os.environ.update(QUIET)  # before Flower is imported
    os.environ.setdefault("RAY_worker_niceness", "0")  # clients are what this command is for
    need_flower("ray")
    import ray
    from flwr.simulation import run_simulation

    from lightning_bpfree.federated.flower.client_app import Parts, client_app_from
    from lightning_bpfree.federated.flower.server_app import server_app_from

    logging.getLogger("flwr").setLevel(logging.WARNING)
    made, arguments = job.made, job.arguments

    def parts_of(_: Any) -> Parts:  # in Ray's processes, which get the options alone
        own = configured(arguments)
        return Parts(own.module, own.datamodule, own.federation, own.rounds)

    run = Run(made.module, made.datamodule, made.federation, made.rounds, evaluate_every=made.evaluate_every)
    app = server_app_from(
        lambda _: run, each, folder=job.folder, save_every=job.save_every, timeout=job.timeout, wait=job.timeout
    )
    cpus = os.cpu_count() or 1
    backend: Any = {
        "init_args": {"num_cpus": cpus, "include_dashboard": False, "log_to_driver": False, "logging_level": "error"},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    try:
        run_simulation(app, client_app_from(parts_of), job.nodes, backend_config=backend)
    finally:
        ray.shutdown()
    if run.server.round < run.rounds:
        raise CommandError(
            f"the simulation ended behind round {run.server.round} of {run.rounds}: see what Flower says."
        )
    return run.test() if run.evaluation else {}


def processes(job: Job, each: Each) -> dict[str, float]:
    """Run with a SuperLink and SuperNodes as processes on this machine, and return the metrics of the test set."""
    need_flower()
    from lightning_bpfree.federated.flower.certificates import loopback_certificates
    from lightning_bpfree.federated.flower.processes import Deployment, write_app

    home = job.folder / "flower"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    app = write_app(home, _code(), app_config(job))
    certificates = loopback_certificates(home) if job.tls else None
    options: dict[str, Any] = {"port": job.port, "certificates": certificates, "authenticate": job.tls}
    # A polite end of this process must end those that it has started; nobody can do so after SIGKILL.
    with ended_by_signal(), Deployment(home, job.nodes, environment=_THREADS, **options) as deployment:
        follow(deployment, deployment.submit(app), job.folder, each)
    return {name: float(value) for name, value in json.loads((job.folder / "test.json").read_text())["test"].items()}


@contextlib.contextmanager
def ended_by_signal() -> Iterator[None]:
    """Make SIGTERM raise SystemExit in this context, so that processes started in it are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _code() -> str:
    from lightning_bpfree.cli.federate.apps import CODE

    return CODE


def app_config(job: Job) -> dict[str, str | int | float | bool]:
    """Return the configuration of a run in Flower's own processes."""
    return {
        "arguments": json.dumps(job.arguments),
        "folder": str(job.folder.absolute()),
        "save-every": job.save_every,
        "timeout": job.timeout,
        "wait": max(60.0, job.timeout),
    }


def follow(deployment: Any, run: str, folder: Path, each: Each, poll: float = 1.0) -> None:
    """Wait for the end of a run in processes, and pass on its rows as they arrive.

    Args:
        deployment: the deployment that runs it.
        run: its id.
        folder: the folder to which it writes its rows.
        each: called with None and the row of every round.
        poll: seconds between two checks.
    """
    seen = 0
    while True:
        status = deployment.status(run)
        rows = read_rows(folder / "rounds.csv")
        for row in rows[seen:]:
            each(None, row)
        seen = max(seen, len(rows))
        if status.startswith("finished"):
            if status != "finished:completed":
                raise CommandError(f"the run ended as {status}: see the logs in {folder / 'flower'}.")
            return
        time.sleep(poll)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file of rounds; empty if there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value not in ("", None)}
            for row in csv.DictReader(file)
        ]


ENGINES: dict[str, Callable[[Job, Each], dict[str, float]]] = {
    "in-process": in_process,
    "flower-simulation": simulation,
    "flower-processes": processes,
}
