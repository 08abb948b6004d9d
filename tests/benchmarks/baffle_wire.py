"""Bytes of a client on the wire: python tests/benchmarks/baffle_wire.py OUT.json.

A SuperLink and one SuperNode with a counting relay between them; runs of two rounds more and less of each kind. The
difference is what two rounds take, polling of an idle node included, which is measured too and taken off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CODE = """\
from baffle_wire import client_of, server_of

server = server_of()
client = client_of()
"""
KINDS = {
    "K=20, 2,410 parameters": (20, 32),
    "K=200, 2,410 parameters": (200, 32),
    "K=200, 75,010 parameters": (200, 1000),
    "backprop, 2,410 parameters": (None, 32),
    "backprop, 75,010 parameters": (None, 1000),
}


class Relay:
    """Hands bytes on between a port of its own and another one, and counts them by direction."""

    def __init__(self, target):
        self.target, self.up, self.down = target, 0, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.server.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            for source, sink, name in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pump, args=(source, sink, name), daemon=True).start()

    def _pump(self, source, sink, name):
        try:
            while data := source.recv(1 << 16):
                setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def parts(context):
    from lightning_bpfree.demos.data import DigitsDataModule
    from lightning_bpfree.demos.modules import MLP, Classifier
    from lightning_bpfree.federated.fedavg import FedAvg
    from lightning_bpfree.federated.federation import Federation
    from lightning_bpfree.federated.settings import Baffle

    num, hidden = KINDS[str(context.run_config["kind"])]
    method = FedAvg("gradients", 1) if num is None else Baffle(num, batches=1, chunk_size=20)
    module = Classifier(MLP(64, [hidden], 10, activation="hardswish"))
    return module, DigitsDataModule(batch_size=32), Federation(method, num_clients=1)


def client_of():
    from lightning_bpfree.federated.flower.client_app import Parts, client_app_from

    return client_app_from(lambda context: Parts(*parts(context), 1))


def server_of():
    from lightning_bpfree.federated.flower.server_app import server_app_from
    from lightning_bpfree.federated.run import Run

    def run_of(context):
        return Run(*parts(context), int(context.run_config["rounds"]), evaluate_every=0)

    return server_app_from(run_of, of_context=lambda _: {"folder": None, "timeout": 300.0, "wait": 120.0})


def measured(deployment, relay, app, config):
    """Return bytes up and down of a run, and its seconds."""
    up, down, started = relay.up, relay.down, time.monotonic()
    run = deployment.submit(app, config)
    while not (status := deployment.status(run)).startswith("finished"):
        time.sleep(0.5)
    if status != "finished:completed":
        raise RuntimeError(f"{config}: {status}")
    time.sleep(2)
    return relay.up - up, relay.down - down, time.monotonic() - started


def main(argv=None):
    from lightning_bpfree.federated.flower.processes import Deployment, write_app

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    rows = []
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        app = write_app(folder, CODE, {"kind": next(iter(KINDS)), "rounds": 1})
        deployment = Deployment(folder, 1, environment=environment)
        relay = Relay(deployment.port)
        deployment.node_port = relay.port
        with deployment:
            time.sleep(10)
            up, down, started = relay.up, relay.down, time.monotonic()
            time.sleep(20)
            idle = [(now - then) / (time.monotonic() - started) for now, then in ((relay.up, up), (relay.down, down))]
            for kind, (num, hidden) in KINDS.items():
                found = {r: measured(deployment, relay, app, {"kind": kind, "rounds": r}) for r in (1, 3)}
                seconds = found[3][2] - found[1][2]
                sent = [(found[3][i] - found[1][i] - idle[i] * seconds) / 2 for i in (0, 1)]
                rows.append(
                    {"kind": kind, "numbers": num, "hidden": hidden, "up": sent[0], "down": sent[1], "seconds": seconds}
                )
                print(rows[-1], flush=True)
    found = {
        "command": "python tests/benchmarks/baffle_wire.py OUT.json",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "flwr": __import__("flwr").__version__},
        "idle_bytes_a_second": idle,
        "rows": rows,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
