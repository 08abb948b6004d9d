"""Real processes: SuperLink, SuperNodes, certificates, and faults; and what is refused before any process starts."""

import datetime
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from federated_problems import Data, Module

pytest.importorskip("flwr")
pytest.importorskip("cryptography")

from faulty_app import CODE, parts

from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.flower.certificates import Certificates, loopback_certificates
from lightning_bpfree.federated.flower.processes import Deployment, _marked, check_port, free_port, write_app
from lightning_bpfree.federated.partition import Partition
from lightning_bpfree.federated.server import BaffleServer

HERE = Path(__file__).parent


# --- refused before any process starts ---


def test_a_port_in_use_is_refused(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port}: in use .* give port=None"):
            Deployment(tmp_path, 1, port=port)
    check_port(free_port())
    with pytest.raises(ValueError, match="port=70000: give a port from 1 to 65,535"):
        check_port(70000)


def test_certificates_are_checked(tmp_path):
    good = loopback_certificates(tmp_path)
    good.check()
    assert oct(good.key.stat().st_mode)[-3:] == "600"
    with pytest.raises(ValueError, match=r"certificate=.*none.pem: cannot be read .* give the path of a PEM file"):
        good._replace(certificate=tmp_path / "none.pem").check()
    with pytest.raises(ValueError, match=r"key=.*: it is no PEM file of that kind"):
        good._replace(key=good.ca).check()
    (tmp_path / "other").mkdir()
    other = loopback_certificates(tmp_path / "other")
    with pytest.raises(ValueError, match="it is not the key of certificate="):
        good._replace(key=other.key).check()
    with pytest.raises(ValueError, match="not issued by ca="):
        good._replace(ca=other.ca).check()
    with pytest.raises(ValueError, match="authenticate=True needs certificates"):
        Deployment(tmp_path, 1, authenticate=True)


def test_expired_certificates_are_refused(tmp_path, monkeypatch):
    certificates = loopback_certificates(tmp_path, days=1)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=2)

    class Clock:
        datetime, timezone, timedelta = Later, datetime.timezone, datetime.timedelta

    monkeypatch.setattr("lightning_bpfree.federated.flower.certificates.datetime", Clock)
    with pytest.raises(ValueError, match=r"ca=.*: valid from .* and now it is .*: have it renewed"):
        Deployment(tmp_path, 1, certificates=Certificates(*certificates))


# --- processes ---


def test_what_a_killed_process_has_started_ends_with_it(tmp_path):
    """Flower's programs start others in sessions of their own, which no signal to the group reaches."""
    deployment = Deployment(tmp_path, 1)
    # 100 MB each: the system needs a while to end them, and stop() must not return before
    child = "import time; held = bytearray(b'1') * 100_000_000; print(flush=True); time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"command = [sys.executable, '-c', {child!r}]\n"
        "all = [subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) for _ in range(4)]\n"
        "[child.stdout.readline() for child in all]\n"
        "open('ready', 'w').close()\n"
        "time.sleep(600)"
    )
    deployment._found = lambda command: [sys.executable, "-c", code]
    deployment.link = deployment._started("superlink", ["flower-superlink"])
    mark = f"{tmp_path}:superlink"
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(_marked(mark)) == 5
    deployment.stop()
    assert _marked(mark) == []


def await_rounds(folder, num, seconds, deployment, run):
    deadline, looked = time.monotonic() + seconds, time.monotonic()
    path = folder / "history.json"
    while time.monotonic() < deadline:
        if path.exists() and len(json.loads(path.read_text())) >= num:
            return
        if time.monotonic() > looked + 20:  # a command of Flower's takes a second or two
            looked = time.monotonic()
            assert deployment.status(run) != "finished:failed"
        time.sleep(0.3)
    pytest.fail(f"no round {num} after {seconds:.0f} s; see {folder}")


def processes_with(text):
    """Return the command lines of running processes that name a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def expected(rounds):
    """Return the weights behind rounds of these partitions, made in this process."""
    module, _, federation = parts()
    server = BaffleServer(module, federation.method, federation.seed)
    partition = Partition(Data(num=100), federation.num_clients, None, federation.split_seed)
    clients = [BaffleClient(Module(optimizer="adam"), partition.client(i), federation.method, i) for i in range(10)]
    for chosen in rounds:
        told = server.begin(chosen)
        server.finish([clients[i].answer(told[i]) for i in chosen])
    return {name: param.clone() for name, param in server.params.items()}


@pytest.mark.slow  # ten clients, a process for every message
@pytest.mark.timeout(1500)  # 400 s on two slow cores with nothing beside it
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_faults_of_clients_and_of_the_server(tmp_path):
    """Over TLS with authenticated nodes: liars are left out, three nodes and then the server are killed, it goes on."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import lightning_bpfree.public"], check=True
    )  # all of it, as a client does
    timeout = round(15 + 16 * (time.monotonic() - started))  # ten clients start in a round, on however many cores
    environment = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]), "OMP_NUM_THREADS": "1"}
    app = write_app(tmp_path, CODE, {"rounds": 3, "folder": str(tmp_path), "timeout": timeout})
    certificates = loopback_certificates(tmp_path)
    secured = {"certificates": certificates, "authenticate": True, "environment": environment}
    with Deployment(tmp_path, 10, **secured) as deployment:
        run = deployment.submit(app)
        await_rounds(tmp_path, 1, 3 * timeout, deployment, run)
        time.sleep(1)
        for number in range(3):
            deployment.kill_node(number)
        await_rounds(tmp_path, 2, 3 * timeout, deployment, run)
        deployment.kill_link()
        deployment.start_link()
        run = deployment.submit(app)
        await_rounds(tmp_path, 3, 3 * timeout, deployment, run)
        deadline = time.monotonic() + 60
        while not deployment.status(run).startswith("finished") and time.monotonic() < deadline:
            time.sleep(0.5)
        assert deployment.status(run) == "finished:completed"
    assert processes_with(str(tmp_path)) == []
    history = json.loads((tmp_path / "history.json").read_text())
    assert [row["round"] for row in history] == [1, 2, 3]
    assert [row["clients"] for row in history] == [8, 4, 5]
    state = torch.load(tmp_path / "federation.ckpt", weights_only=True)
    honest = [3, 4, 5, 6]
    # Client 9 has its old answer in the state of the first run, and answers the first round of the second one honestly.
    for name, value in expected([[0, 1, 2, *honest, 9], honest, [*honest, 9]]).items():
        # clients are summed in the order of their nodes' ids, in float64; weights are float32
        torch.testing.assert_close(state["server"]["params"][name], value, rtol=1e-5, atol=1e-6)
