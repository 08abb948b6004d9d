"""The server: answers that it leaves out, clients in step, and versions that do not fit."""

import pytest
import torch
from federated_problems import Module, assert_equal, federation, run, weights

from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.messages import Reply, fault
from lightning_bpfree.federated.settings import Baffle

BAD = {
    "not a number": {"differences": torch.full((1, 2), torch.nan)},
    "infinite": {"differences": torch.tensor([[0.0, torch.inf]])},
    "huge": {"differences": torch.tensor([[0.0, 1e30]])},
    "too few": {"differences": torch.zeros(1, 1)},
    "none": {"differences": None},
    "an old round": {"round": 2},
    "another seed": {"seed": 1},
    "no samples": {"num_samples": 0},
    "negative samples": {"num_samples": -5},
    "samples without end": {"num_samples": float("inf")},
    "refused": {"refused": "no"},
    "short masks": {"masked": b"12345678"},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_an_answer_is_said(name):
    good = {"client": 0, "round": 3, "seed": 9, "differences": torch.zeros(1, 2), "num_samples": 5}
    assert fault(Reply(**good), Baffle(2), 3, 9, 100.0) is None
    assert fault(Reply(**{**good, **BAD[name]}), Baffle(2), 3, 9, 100.0)


def test_a_bad_client_is_left_out_and_the_round_goes_on():
    settings = Baffle(3)
    server, clients = federation(settings)
    told = server.begin(range(3))
    answers = [client.answer(told[i]) for i, client in enumerate(clients)]
    spoiled = Reply(**{**vars(answers[1]), "differences": torch.full((1, 3), torch.nan).double()})
    with pytest.warns(UserWarning, match="is left out") as warned:
        report = server.finish([answers[0], spoiled, answers[2], answers[0]])
    assert [str(one.message) for one in warned] == [
        "round 1: client 1 is left out: difference 0 is nan.",
        "round 1: client 0 is left out: it has answered already.",  # its second answer
    ]
    assert report.used == [0, 2]
    other, again = federation(settings)
    told = other.begin(range(3))
    other.finish([again[0].answer(told[0]), again[2].answer(told[2])])
    assert_equal(weights(server.module), weights(other.module))


def test_a_round_without_answers_changes_nothing():
    server, clients = federation(Baffle(3))
    before = weights(server.module)
    server.begin(range(3))
    report = server.finish([])
    assert not report.updated
    assert_equal(before, weights(server.module))
    assert run(server, clients)[0].round == 2


def test_clients_in_step_make_the_same_weights_and_get_numbers_alone():
    settings = Baffle(3)
    server, clients = federation(settings, downlink="numbers", module=Module(optimizer="adam"))
    for client in clients:
        client.loss.module.kind = "adam"
    plain, others = federation(settings, module=Module(optimizer="adam"))
    for number in range(1, 5):
        told = server.begin(range(3))
        assert (told[0].weights is None) == (number > 1)
        answers = [clients[i].answer(told[i]) for i in range(3) if (number, i) != (2, 1)]  # client 1 misses a round
        server.finish(answers)
        of_plain = plain.begin(range(3))
        plain.finish([others[i].answer(of_plain[i]) for i in range(3) if (number, i) != (2, 1)])
    assert_equal(weights(server.module), weights(plain.module))


def test_a_client_that_is_out_of_step_is_sent_weights():
    server, clients = federation(Baffle(3), downlink="numbers")
    run(server, clients, 2)
    with torch.no_grad():
        clients[1].loss.params["net.0.weight"].add_(1e-3)
    with pytest.warns(UserWarning, match="client 1 is left out: out of step: the weights differ"):
        assert run(server, clients)[0].used == [0, 2]
    told = server.begin(range(3))
    assert told[1].weights is not None
    assert clients[1].answer(told[1]).refused == ""


def test_another_version_of_the_module_is_refused():
    settings = Baffle(3)
    server, clients = federation(settings)

    class Wider(Module):
        def __init__(self):
            super().__init__()
            self.net[3] = torch.nn.Linear(6, 4)

    other = BaffleClient(Wider(), clients[0].data, settings, 0)
    refused = other.answer(server.begin([0])[0]).refused
    assert "another module" in refused
    assert server.fingerprint in refused
    assert Baffle(3).fingerprint(server.params, {}) != Baffle(3, sigma=1e-3).fingerprint(server.params, {})
    assert Baffle(3).fingerprint(server.params, {}) == Baffle(3, chunk_size=2).fingerprint(server.params, {})


def test_the_fingerprint_tells_frozen_values_and_the_bits_of_directions(monkeypatch):
    params, frozen = {"w": torch.zeros(3)}, {"f": torch.ones(2)}
    own = Baffle(3).fingerprint(params, frozen)
    assert own == Baffle(3).fingerprint({"w": torch.ones(3)}, {"f": torch.ones(2)})  # trained values are sent
    assert own != Baffle(3).fingerprint({"v": torch.zeros(3)}, frozen)
    assert own != Baffle(3).fingerprint({"w": torch.zeros(3, 1)}, frozen)
    assert own != Baffle(3).fingerprint(params, {"f": torch.tensor([1.0, 1.0 + 2**-23])})
    drawn = Baffle.drawn

    class Off(dict):
        def __getitem__(self, k):
            return {"w": torch.nextafter(drawn(Baffle(3), params, 0)[0]["w"], torch.ones(3))}

    monkeypatch.setattr(Baffle, "drawn", lambda *_: Off())
    assert own != Baffle(3).fingerprint(params, frozen)
