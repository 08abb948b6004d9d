"""A real deployment on one machine: starts and stops SuperLink, SuperNodes and runs as separate processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_bpfree.federated.flower.certificates import Certificates, node_keys
from lightning_bpfree.federated.flower.needed import need_flower, quiet_environment

HOST = "127.0.0.1"
CONNECTION = "bpfree"
_MARK = "BPFREE_STARTED_AS"

APP = """\
[project]
name = "bpfree-federation"
version = "1.0.0"
description = "BAFFLE: federated learning by forward passes"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "lightning-bpfree"

[tool.flwr.app.components]
serverapp = "bpfree_federation.apps:server"
clientapp = "bpfree_federation.apps:client"

[tool.flwr.app.config]
"""


def free_port() -> int:
    """Return a free port of the loopback device."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def check_port(port: int) -> None:
    """Raise ValueError if a port of the loopback device is in use or out of range."""
    if not 0 < port < 1 << 16:
        raise ValueError(f"Deployment: port={port}: give a port from 1 to 65,535, or None for a free one.")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left counts as free
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise ValueError(
                f"Deployment: port={port}: in use ({error.strerror}): stop what listens there, or give port=None."
            ) from error


def write_app(folder: Path, code: str, config: Mapping[str, str | int | float | bool]) -> Path:
    """Write a Flower app, and return its folder.

    Args:
        folder: where to write the app.
        code: the code of the module that defines ``server`` and ``client``.
        config: the configuration of the run, with names that can be overridden.
    """
    app = folder / "app"
    package = app / "bpfree_federation"
    package.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.items()]
    (app / "pyproject.toml").write_text(APP + "\n".join(lines) + "\n", encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "apps.py").write_text(code, encoding="utf-8")
    return app


class Deployment:
    """Starts ``flower-superlink`` and ``flower-supernode`` processes, runs an app on them, and stops them all.

    Use it as a context manager; after it, no process is left running, and no file was written outside of ``folder``.

    Args:
        folder: for state, logs and the app; also ``FLWR_HOME``.
        num_nodes: number of SuperNodes; node ``i`` has the partition id ``i``.
        port: port of the SuperLink; None for a free one.
        certificates: for TLS; None for no TLS, which is suitable only for the loopback device.
        authenticate: whether to accept only nodes with registered keys; needs ``certificates``.
        environment: further variables for all processes.

    Raises:
        ValueError: for a port in use, or certificates that are missing, expired, or do not match.
        ModuleNotFoundError: if Flower is not installed.
    """

    def __init__(
        self,
        folder: Path,
        num_nodes: int,
        *,
        port: int | None = None,
        certificates: Certificates | None = None,
        authenticate: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        need_flower("cryptography")
        if port is not None:
            check_port(port)
        if certificates is not None:
            certificates.check()
        elif authenticate:
            raise ValueError("Deployment: authenticate=True needs certificates: Flower authenticates nodes over TLS.")
        self.folder, self.num_nodes = folder.absolute(), num_nodes
        self.port = free_port() if port is None else port
        self.node_port = self.port  # another one for nodes that reach the SuperLink through something in between
        self.certificates, self.authenticate = certificates, authenticate
        # Flower's programs start one another by name, and those beside the interpreter may not be on the PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        own = {"FLWR_HOME": str(self.folder / "home"), "PATH": path}
        self.environment = {**quiet_environment(), **(environment or {}), **own}
        self.link: subprocess.Popen[bytes] | None = None
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._keys: dict[int, Path] = {}

    def __enter__(self) -> Deployment:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- starting and stopping ---

    def start(self) -> None:
        """Start the SuperLink, register the nodes' keys, and start the nodes."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        tls = f'root-certificates = "{self.certificates.ca.absolute()}"' if self.certificates else "insecure = true"
        lines = ["[superlink]", f'default = "{CONNECTION}"', f"[superlink.{CONNECTION}]"]
        lines += [f'address = "{HOST}:{self.port}"', tls, ""]
        (home / "config.toml").write_text("\n".join(lines), encoding="utf-8")
        self.start_link()
        for number in range(self.num_nodes):
            self.start_node(number)

    def start_link(self) -> None:
        """Start the SuperLink with its existing database, if any, and wait until it listens."""
        command = ["flower-superlink", "--host", HOST, "--port", str(self.port)]
        command += ["--disable-runtime-dependency-installation", "--database", str(self.folder / "superlink.db")]
        if self.certificates is None:
            command.append("--insecure")
        else:
            paths = self.certificates
            command += ["--ssl-ca-certfile", str(paths.ca), "--ssl-certfile", str(paths.certificate)]
            command += ["--ssl-keyfile", str(paths.key)]
        if self.authenticate:
            command.append("--enable-supernode-auth")
        self.link = self._started("superlink", command)
        self._await_port(self.link, self.port)
        if self.authenticate and not self._keys:
            self._register()

    def _register(self) -> None:
        folder = self.folder / "keys"
        folder.mkdir(exist_ok=True)
        for number in range(self.num_nodes):
            self._keys[number], public = node_keys(folder, number)
            self.flwr("supernode", "register", str(public), CONNECTION)

    def start_node(self, number: int) -> None:
        """Start a SuperNode."""
        command = ["flower-supernode", "--superlink", f"{HOST}:{self.node_port}", "--port", str(free_port())]
        command += ["--node-config", f"partition-id={number}"]
        if self.certificates is None:
            command.append("--insecure")
        else:
            paths = self.certificates
            command += ["--root-certificates", str(paths.ca), "--ssl-ca-certfile", str(paths.ca)]
            command += ["--ssl-certfile", str(paths.certificate), "--ssl-keyfile", str(paths.key)]
        if number in self._keys:
            command += ["--auth-supernode-private-key", str(self._keys[number])]
        self.nodes[number] = self._started(f"node{number}", command)

    def _started(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        # A session of its own keeps the terminal's signals away; what it starts is known by this variable.
        environment = {**self.environment, _MARK: f"{self.folder}:{name}"}
        process = subprocess.Popen(
            self._found(command), env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
        )
        log.close()
        return process

    def _found(self, command: Sequence[str]) -> list[str]:
        """Return a command with the path of its program: beside the interpreter, for it may not be on the PATH."""
        return [str(Path(sys.executable).parent / command[0]), *command[1:]]

    def _await_port(self, process: subprocess.Popen[bytes], port: int, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(
                    f"flower-superlink ended with {process.returncode}: see {self.folder / 'superlink.log'}"
                )
            with socket.socket() as tried:
                if tried.connect_ex((HOST, port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"flower-superlink does not listen on port {port} after {seconds:g} s: see its log")

    def kill_node(self, number: int) -> None:
        """Kill a node and all of its child processes immediately."""
        _kill(self.nodes.pop(number), f"{self.folder}:node{number}")

    def kill_link(self) -> None:
        """Kill the SuperLink, and with it the server of a run, immediately."""
        if self.link is not None:
            _kill(self.link, f"{self.folder}:superlink")
            self.link = None

    def stop(self) -> None:
        """Terminate all processes, and kill those that do not exit."""
        running = {f"node{number}": process for number, process in self.nodes.items()}
        if self.link is not None:
            running["superlink"] = self.link
        for process in running.values():
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(process.poll() is None for process in running.values()):
            time.sleep(0.05)
        self.nodes, self.link = {}, None
        with contextlib.ExitStack() as kills:  # all of them run, also if one raises
            for name, process in running.items():
                kills.callback(_kill, process, f"{self.folder}:{name}")

    # --- runs ---

    def flwr(self, *arguments: str, seconds: float = 300.0) -> str:
        """Run the command ``flwr``, and return its output.

        Raises:
            RuntimeError: if it fails; the message contains the output.
        """
        command = self._found(["flwr", *arguments])
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=seconds, cwd=self.folder, check=False
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(arguments)} failed: {(done.stdout + done.stderr).strip()[-1000:]}")
        return done.stdout

    def _told(self, *arguments: str) -> dict[str, Any]:
        """Return what ``flwr`` says in JSON.

        Raises:
            RuntimeError: if it says that it failed.
        """
        told: dict[str, Any] = json.loads(self.flwr(*arguments, "--format", "json"))
        if not told.get("success"):
            raise RuntimeError(f"flwr {arguments[0]} failed: {json.dumps(told)[:1000]}")
        return told

    def submit(self, app: Path, config: Mapping[str, str | int | float | bool] | None = None) -> str:
        """Submit a run of an app, and return its id.

        Args:
            app: its folder.
            config: values that override those of the app.
        """
        override = [part for k, v in (config or {}).items() for part in ("--run-config", f"{k}={json.dumps(v)}")]
        told = self._told("run", str(app), CONNECTION, *override)
        return str(told["run-id"])

    def status(self, run: str) -> str:
        """Return the status of a run: ``"running"``, ``"finished:completed"``, ``"finished:failed"`` and so on."""
        told = self._told("list", CONNECTION)
        return next((str(own["status"]) for own in told["runs"] if str(own["run-id"]) == run), "unknown")


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _kill(process: subprocess.Popen[bytes], mark: str, seconds: float = 10.0) -> None:
    """Kill a process, its group, and what it has started in sessions of their own; return when they are gone.

    Raises:
        RuntimeError: if one of them is still there after ``seconds``.
    """
    _signal(process, signal.SIGKILL)
    process.wait(timeout=seconds)
    deadline, empty = time.monotonic() + seconds, 0
    while empty < 2:  # twice: a process that is just being started shows no environment for a moment
        left = _marked(mark)
        empty = 0 if left else empty + 1
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if left and time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} of {mark} are still running {seconds:g} s after they were killed")
        time.sleep(0.01)


def _marked(mark: str) -> list[int]:
    """Return the processes that have inherited a mark; none where the system does not tell."""
    entry, found = f"{_MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # one that has ended, or somebody else's
            if entry in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
