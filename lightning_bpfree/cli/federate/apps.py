"""The apps that Flower's own processes import; both build their parts from the configuration of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flwr.app import Context

from lightning_bpfree.cli.common.records import finite, write_csv, write_json
from lightning_bpfree.cli.federate.configured import configured
from lightning_bpfree.federated.flower.client_app import Parts, client_app_from
from lightning_bpfree.federated.flower.server_app import server_app_from
from lightning_bpfree.federated.run import Row, Run

CODE = """\
from lightning_bpfree.cli.federate import apps

server = apps.server()
client = apps.client()
"""


def arguments_of(context: Context) -> list[str]:
    """Return the options of a run."""
    arguments: list[str] = json.loads(str(context.run_config["arguments"]))
    return arguments


def client() -> Any:
    """Return the ClientApp."""

    def parts_of(context: Context) -> Parts:
        made = configured(arguments_of(context))
        return Parts(made.module, made.datamodule, made.federation, made.rounds)

    return client_app_from(parts_of)


def server() -> Any:
    """Return the ServerApp, which saves rows and checkpoint in the folder of the run."""
    settings: dict[str, Any] = {}

    def run_of(context: Context) -> Run:
        settings.update(context.run_config)
        made = configured(arguments_of(context))
        return Run(made.module, made.datamodule, made.federation, made.rounds, evaluate_every=made.evaluate_every)

    def each(run: Run, row: Row) -> None:
        write_rows(run.history, Path(str(settings["folder"])))
        if row["round"] == run.rounds:
            write_json(
                finite({"test": run.test() if run.evaluation else {}}), Path(str(settings["folder"])) / "test.json"
            )

    return server_app_from(run_of, each, of_context=_options)


def _options(context: Context) -> dict[str, Any]:
    given: Any = context.run_config
    return {
        "folder": str(given["folder"]),
        "save_every": int(given["save-every"]),
        "timeout": float(given["timeout"]),
        "wait": float(given["wait"]),
    }


def write_rows(history: list[Row], folder: Path) -> None:
    """Write the rows of all rounds to ``rounds.csv``."""
    fields = list(dict.fromkeys(name for row in history for name in row))
    write_csv(fields, history, folder / "rounds.csv")
