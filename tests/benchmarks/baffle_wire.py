"""Bytes of a client on the wire: python tests/benchmarks/baffle_wire.py docs/results/baffle_cost.json.

A SuperLink and one SuperNode, with a relay between them that counts bytes by the path of the HTTP request, heads
included. Up: what the node pushes in a round. Down: the objects that it pulls. Polling of an idle node is left out.
The rows are put beside what the file has, and written after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
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
    """Hands bytes on between a port of its own and another one, and counts them by the path of the HTTP request."""

    def __init__(self, target):
        self.target, self.up, self.down = target, Counter(), Counter()
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
            paths = deque()  # of the requests of this connection whose answers are to come
            for source, sink, counts in ((near, far, self.up), (far, near, self.down)):
                threading.Thread(target=self._pump, args=(source, sink, counts, paths), daemon=True).start()

    def _pump(self, source, sink, counts, paths):
        rest, path, left = b"", "", 0
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
                rest += data
                while rest:
                    if not left:  # the head of a request or of an answer
                        head, end, _ = rest.partition(b"\r\n\r\n")
                        if not end:
                            break
                        if counts is self.up:
                            path = head.split(b" ", 2)[1].decode()
                            paths.append(path)
                        else:
                            path = paths.popleft() if paths else "?"
                        length = re.search(rb"(?im)^content-length: *(\d+)", head)
                        left = len(head) + 4 + (int(length[1]) if length else 0)
                    part, rest = rest[:left], rest[left:]
                    counts[path] += len(part)
                    left -= len(part)
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
    """Return the bytes of messages in a run, up and down: of requests that push, and of answers to those that pull."""
    relay.up.clear(), relay.down.clear()
    run = deployment.submit(app, config)
    while not (status := deployment.status(run)).startswith("finished"):
        time.sleep(0.5)
    if status != "finished:completed":
        raise RuntimeError(f"{config}: {status}")
    time.sleep(2)
    up = sum(num for path, num in relay.up.items() if "push" in path)
    return up, sum(num for path, num in relay.down.items() if "object" in path), dict(relay.up), dict(relay.down)


def main(argv=None):
    from lightning_bpfree.federated.flower.processes import Deployment, write_app

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args(argv)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    wire = {
        "command": "python tests/benchmarks/baffle_wire.py docs/results/baffle_cost.json",
        "versions": {"python": platform.python_version(), "flwr": importlib.metadata.version("flwr")},
    }
    rows = {row["kind"]: row for row in found.get("wire", {}).get("rows", [])}
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        app = write_app(folder, CODE, {"kind": next(iter(KINDS)), "rounds": 1})
        deployment = Deployment(folder, 1, environment=environment)
        relay = Relay(deployment.port)
        deployment.node_port = relay.port
        with deployment:
            time.sleep(5)
            for kind in options.kinds:
                num, hidden = KINDS[kind]
                up, down, *by_path = measured(deployment, relay, app, {"kind": kind, "rounds": 1})
                rows[kind] = {
                    "kind": kind,
                    "numbers": num,
                    "parameters": 64 * hidden + hidden + hidden * 10 + 10,
                    "up": up,
                    "down": down,
                    "by_path": by_path,
                }
                wire["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
                found["wire"] = {**wire, "rows": [rows[own] for own in KINDS if own in rows]}
                options.out.write_text(json.dumps(found, indent=1) + "\n")
                sys.stdout.write(f"{kind}: {up} {down}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
