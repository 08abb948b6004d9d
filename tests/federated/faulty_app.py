"""What a Flower app for the test of faults has in it: clients that lie, and some that never answer again.

By partition id: 0 to 2 hang from the second round on, until they are killed; 7 sends NaN, 8 huge numbers, and 9 its
answer of the first round again.
"""

import json
import time
from pathlib import Path

from federated_problems import Data, Module
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.flower.client_app import client_app
from lightning_bpfree.federated.flower.server_app import server_app_from
from lightning_bpfree.federated.run import Run
from lightning_bpfree.federated.settings import Baffle

CODE = """\
from faulty_app import make_client, make_server

server = make_server()
client = make_client()
"""
HANG, NAN, HUGE, OLD = (0, 1, 2), 7, 8, 9


def parts():
    return Module(optimizer="adam"), Data(num=100), Federation(Baffle(3, chunk_size=3, batches=1), num_clients=10)


def make_client():
    module, data, federation = parts()
    inner, app = client_app(module, data, federation), ClientApp()

    @app.train()
    def train(message, context):
        own, number = context.node_config["partition-id"], dict(message.content["round"])["round"]
        if own in HANG and number > 1:
            time.sleep(600)
        content = inner(message, context).content
        if own in (NAN, HUGE):
            content["numbers"] = MetricRecord({"differences": [float("nan") if own == NAN else 1e30, 0.0, 0.0]})
        if own == OLD:
            for name in list(content):
                content[name] = context.state.setdefault(f"old {name}", content[name])
        return Message(RecordDict(dict(content)), reply_to=message)

    return app


def make_server():
    def run_of(context):
        module, data, federation = parts()
        return Run(module, data, federation, int(context.run_config["rounds"]), evaluate_every=0)

    def each(run, row):
        folder = Path(run.folder)
        (folder / "history.tmp").write_text(json.dumps(run.history))
        (folder / "history.tmp").replace(folder / "history.json")

    def options(context):
        given = context.run_config
        return {"folder": given["folder"], "timeout": float(given["timeout"]), "wait": float(given["timeout"]) / 2}

    def with_folder(context):
        run = run_of(context)
        run.folder = context.run_config["folder"]
        return run

    return server_app_from(with_folder, each, of_context=options)
