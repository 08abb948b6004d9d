"""BAFFLE on Flower's Message API, without its processes: the same weights, and faults of clients."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from federated_problems import Data, Module, assert_equal, weights

pytest.importorskip("flwr")

from fake_grid import FakeGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from lightning_bpfree.federated.fedavg import FedAvg
from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.flower.client_app import client_app
from lightning_bpfree.federated.flower.records import array_record, reply_of
from lightning_bpfree.federated.flower.server_app import server_app
from lightning_bpfree.federated.flower.strategy import BaffleStrategy
from lightning_bpfree.federated.in_process import InProcessFederation
from lightning_bpfree.federated.run import Run
from lightning_bpfree.federated.settings import Baffle

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:round .*:UserWarning"),
]
ROUNDS = 4


@pytest.fixture(autouse=True)
def a_task():
    """Flower makes messages within a task only."""
    before = TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    yield
    TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


def settings(**changed):
    return Federation(**{"method": Baffle(3, chunk_size=3, batches=1), "num_clients": 4, "ema": 0.5, **changed})


def on_flower(federation, rounds=ROUNDS, spoil=lambda node, message, reply: reply, **strategy):
    """Run a federation on the fake grid, and return run and grid."""
    run = Run(Module(optimizer="adam"), Data(), federation, rounds, evaluate_every=0)
    app = client_app(Module(optimizer="adam"), Data(), federation, rounds)
    grid = FakeGrid(app, federation.num_clients, spoil)
    strategy = BaffleStrategy(run, wait=0.1, **strategy)
    strategy.start(grid, array_record(run.server.params), num_rounds=rounds - run.server.round, timeout=1)
    return run, grid


CASES = {
    "weights": {},
    "numbers": {"downlink": "numbers"},
    "secure": {"secure": True},
    "sampled": {"fraction": 0.5, "min_clients": 2},
    "per client": {"method": Baffle(3, noise="per_client")},
    "backprop": {"method": FedAvg()},
}


@pytest.mark.parametrize("name", CASES)
def test_flower_makes_the_weights_of_one_process(name):
    if name == "secure":
        pytest.importorskip("cryptography")
    federation = settings(**CASES[name])
    alone = InProcessFederation(Module(optimizer="adam"), Data(), federation, ROUNDS, evaluate_every=0)
    alone.fit()
    run, grid = on_flower(federation)
    assert_equal(weights(alone.module), weights(run.module))
    assert_equal(alone.server.average, run.server.average)
    kept = ("round", "clients", "left_out", "bytes_up", "bytes_down", "forward_passes")
    assert [[row[n] for n in kept] for row in alone.history] == [[row[n] for n in kept] for row in run.history]
    assert len([kind for _, kind in grid.asked if kind == "train"]) == ROUNDS * federation.in_a_round


def changed(record, **values):
    """Return an answer with other values in its records."""
    made = RecordDict(dict(record))
    for key, value in values.items():
        name, _, entry = key.partition("__")
        made[name] = type(record[name])({**dict(record[name]), entry: value})
    return made


NAN, HUGE = float("nan"), 1e30
FAULTS = {
    "NaN": ({"numbers__differences": [0.0, NAN, 0.0]}, "difference 1 is nan"),
    "huge": ({"numbers__differences": [HUGE, 0.0, 0.0]}, "difference 0 is 1e+30, beyond 100"),
    "too few": ({"numbers__differences": [0.0]}, r"it has \(1, 1\) differences, and \(1, 3\) were asked for"),
    "an old round": ({"round__round": 1}, "it answers round 1 with seed"),
    "no numbers": ({"round__num_samples": "many"}, "its message cannot be read"),
    "no round": ({"round__round": [1, 2]}, "its message cannot be read: TypeError"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_client_is_left_out_and_the_round_goes_on(name):
    values, message = FAULTS[name]

    def spoil(node, asked, reply):
        if node == 102 and asked.metadata.message_type == "train" and dict(asked.content["round"])["round"] >= 2:
            reply.content = changed(reply.content, **values)
        return reply

    with pytest.warns(UserWarning, match=f"round 2: client 1 is left out: {message.replace('+', '.')}"):
        run, _ = on_flower(settings(), spoil=spoil)
    assert [row["clients"] for row in run.history] == [4, 3, 3, 3]
    without = Run(Module(optimizer="adam"), Data(), settings(), ROUNDS, evaluate_every=0)
    app = client_app(Module(optimizer="adam"), Data(), settings(), ROUNDS)

    def drop(node, asked, reply):
        return None if node == 102 and dict(asked.content["round"])["round"] >= 2 else reply

    BaffleStrategy(without, wait=0.1).start(FakeGrid(app, 4, drop), array_record(without.server.params), ROUNDS, 1)
    assert_equal(weights(run.module), weights(without.module))


def test_a_replay_of_an_old_answer_is_left_out():
    old = {}

    def spoil(node, asked, reply):
        if node == 103:
            reply.content = old.setdefault("content", reply.content)
        return reply

    with pytest.warns(UserWarning, match="round 3: client 2 is left out: it answers round 1 with seed"):
        run, _ = on_flower(settings(), spoil=spoil)
    assert [row["clients"] for row in run.history] == [4, 3, 3, 3]


def test_a_silent_node_is_left_alone_for_three_rounds():
    run, grid = on_flower(settings(), rounds=6, spoil=lambda node, asked, reply: None if node == 101 else reply)
    asked = [node for node, _ in grid.asked].count(101)
    assert asked == 2  # in rounds 1 and 5
    assert [row["clients"] for row in run.history] == [3] * 6


def test_nodes_that_are_left_alone_are_asked_where_there_are_no_others():
    """A round that was too short for all of them must not be the last one."""

    def slow(node, asked, reply):
        return None if dict(asked.content["round"])["round"] == 1 else reply

    run, _ = on_flower(settings(), rounds=2, spoil=slow)
    assert [row["clients"] for row in run.history] == [0, 4]


def test_an_app_that_fails_is_left_out():
    federation = settings()
    run = Run(Module(optimizer="adam"), Data(), federation, 1, evaluate_every=0)
    grid = FakeGrid(client_app(Module(optimizer="adam"), Data(), federation), 4)
    grid.contexts[102].node_config.pop("partition-id")
    with pytest.warns(UserWarning, match="client 1 is left out: its app failed: partition-id=None: start every node"):
        BaffleStrategy(run, wait=0.1).start(grid, array_record(run.server.params), 1, 1)
    assert run.history[0]["clients"] == 3


def test_another_version_of_the_module_is_left_out():
    federation = settings()
    run = Run(Module(optimizer="adam"), Data(), federation, 1, evaluate_every=0)

    class Wider(Module):
        def __init__(self):
            super().__init__()
            self.net[3] = torch.nn.Linear(6, 4)

    grid = FakeGrid(client_app(Wider(), Data(), federation), 4)
    with pytest.warns(UserWarning, match="the server trains another module, or with other settings"):
        BaffleStrategy(run, wait=0.1).start(grid, array_record(run.server.params), 1, 1)
    assert run.history[0]["clients"] == 0


def test_secure_sums_survive_drop_outs_and_lost_keys():
    pytest.importorskip("cryptography")

    def spoil(node, asked, reply):
        number = dict(asked.content["round"]).get("round")
        return None if node == 101 and number == 2 and asked.metadata.message_type == "train" else reply

    federation = settings(secure=True)
    run, grid = on_flower(federation, rounds=3, spoil=spoil)
    assert [row["clients"] for row in run.history] == [4, 3, 3]
    lost = dict(grid.contexts[103].state)
    assert lost  # the private key is there, with the node that it is of, and nowhere else

    def forget(node, asked, reply):
        if (
            node == 103
            and dict(asked.content["round"]).get("what") == "masks"
            and dict(asked.content["round"])["round"] == 1
        ):
            other.contexts[103].state = RecordDict()
        return reply

    run = Run(Module(optimizer="adam"), Data(), federation, 3, evaluate_every=0)
    other = FakeGrid(client_app(Module(optimizer="adam"), Data(), federation), 4, forget)
    BaffleStrategy(run, wait=0.1).start(other, array_record(run.server.params), 3, 1)
    assert [row["clients"] for row in run.history] == [4, 3, 4]


def test_a_survivor_that_goes_silent_loses_the_round_alone():
    pytest.importorskip("cryptography")

    def spoil(node, asked, reply):
        record = dict(asked.content["round"])
        return None if node == 101 and record.get("what") == "masks" and record["round"] == 2 else reply

    with pytest.warns(UserWarning, match=r"clients \[0\] sent numbers, and then not their masks: the round is lost"):
        run, _ = on_flower(settings(secure=True), spoil=spoil)
    assert [row["clients"] for row in run.history] == [4, 0, 4, 4]


def test_too_few_nodes_are_an_error():
    federation = settings(min_clients=4)
    run = Run(Module(), Data(), federation, 1, evaluate_every=0)
    grid = FakeGrid(client_app(Module(), Data(), federation), 2)
    with pytest.raises(RuntimeError, match=r"wait=0.1: 2 nodes are there, and min_clients=4 are needed"):
        BaffleStrategy(run, wait=0.1).start(grid, array_record(run.server.params), 1, 1)


def test_the_server_app_resumes_from_its_checkpoint(tmp_path):
    federation = settings(downlink="numbers")
    straight, _ = on_flower(federation)
    for rounds in (2, ROUNDS):  # the server is gone after two rounds, and its clients still have their weights
        module = Module(optimizer="adam")
        app = server_app(module, Data(), federation, ROUNDS, folder=tmp_path, wait=0.1, timeout=1)
        if rounds == 2:
            run = Run(module, Data(), federation, 2, evaluate_every=0)
            grid = FakeGrid(client_app(Module(optimizer="adam"), Data(), federation), 4)
            BaffleStrategy(run, wait=0.1).start(grid, array_record(run.server.params), 2, 1)
            run.save(tmp_path / "federation.ckpt")
        else:
            app(grid, next(iter(grid.contexts.values())))
    assert_equal(weights(straight.module), weights(module))


def test_malformed_answers_are_refusals():
    for content in (
        RecordDict({}),
        RecordDict({"round": ConfigRecord({"round": 1})}),
        RecordDict({"round": MetricRecord({"round": 1, "seed": 2}), "numbers": ConfigRecord({"differences": "none"})}),
        RecordDict({"round": ConfigRecord({"round": 1, "seed": 2, "masked": "text"})}),
        RecordDict({"round": ConfigRecord({"round": 1, "seed": 2}), "weights": ConfigRecord({"a": 1})}),
    ):
        assert reply_of(content, 0, 3).refused.startswith("its message cannot be read")


def test_arrays_are_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "unpickled",))

    file = io.BytesIO()
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    array = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=file.getvalue())
    content = RecordDict({"round": ConfigRecord({"round": 1, "seed": 2}), "weights": ArrayRecord({"w": array})})
    assert "allow_pickle=False" in reply_of(content, 0, 3).refused
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(pickle.dumps(Trap()))  # it would have gone off
    assert (tmp_path / "unpickled").exists()
