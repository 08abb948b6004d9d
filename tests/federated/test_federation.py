"""Federations in one process: deterministic, resumed exactly, with all that may go wrong with clients."""

import pytest
import torch
import torch.nn.functional as F
from federated_problems import Data, Module, assert_equal, weights

from lightning_bpfree.federated.fedavg import FedAvg
from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.in_process import InProcessFederation
from lightning_bpfree.federated.privacy import Privacy
from lightning_bpfree.federated.settings import Baffle, round_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:round .* is left out.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:round .* secure sum.*:UserWarning"),
]
BAFFLE = Baffle(4, chunk_size=4, batches=1)


def federation(rounds=4, module=None, evaluate_every=0, **settings):
    settings = {"method": BAFFLE, "num_clients": 5, "ema": 0.5, **settings}
    return InProcessFederation(
        module or Module(), Data(), Federation(**settings), rounds, evaluate_every=evaluate_every
    )


KINDS = {
    "plain": {},
    "sampled, with drop-outs and stragglers": {"fraction": 0.8, "dropout": 0.3, "straggler": 0.3},
    "per client": {"method": Baffle(3, chunk_size=3, noise="per_client")},
    "numbers down": {"downlink": "numbers", "dropout": 0.3},
    "secure": {"secure": True, "dropout": 0.2},
    "private": {"privacy": Privacy(20.0, 1e-3, 0.1, seed=3), "method": Baffle(4, 1e-2, chunk_size=4)},
    "dirichlet": {"alpha": 0.5},
    "averaging": {"method": FedAvg()},
    "gradients": {"method": FedAvg("gradients", 1), "dropout": 0.2},
}
NEEDS = {"secure": "cryptography", "private": "dp_accounting"}


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(kind, tmp_path):
    pytest.importorskip(NEEDS.get(kind, "torch"))
    settings = KINDS[kind]
    straight = federation(module=Module(optimizer="adam"), **settings)
    straight.fit()
    first = federation(module=Module(optimizer="adam"), **settings)
    for _ in range(2):
        first.run_round()
    first.save(tmp_path / "federation.ckpt")
    first.run_round()  # what came behind the checkpoint is lost
    second = federation(module=Module(optimizer="adam"), **settings)
    second.load(tmp_path / "federation.ckpt")
    assert second.server.round == 2
    second.fit()
    assert_equal(weights(straight.module), weights(second.module))
    assert_equal(straight.server.average, second.server.average)
    # Clients are sent weights after a resume, and are then in step again.
    lasting = [name for name in straight.history[0] if name not in ("seconds", "bytes_down")]
    assert [[row[n] for n in lasting] for row in straight.history] == [
        [row[n] for n in lasting] for row in second.history
    ]


def test_resume_with_other_settings_is_refused(tmp_path):
    run = federation(1)
    run.fit()
    run.save(tmp_path / "federation.ckpt")
    with pytest.raises(ValueError, match="it was made with other settings of dropout, seed"):
        federation(seed=1, dropout=0.5).load(tmp_path / "federation.ckpt")
    with pytest.raises(ValueError, match="other settings of method"):
        federation(method=Baffle(5)).load(tmp_path / "federation.ckpt")

    class Wider(Module):
        def __init__(self):
            super().__init__()
            self.net[3] = torch.nn.Linear(6, 4)

    with pytest.raises(ValueError, match="the checkpoint is of the fingerprint"):
        federation(module=Wider()).load(tmp_path / "federation.ckpt")


def test_secure_sums_change_the_mean_by_less_than_their_step():
    pytest.importorskip("cryptography")
    plain, secure = federation(2), federation(2, secure=True)
    plain.fit(), secure.fit()
    for name, value in weights(plain.module).items():
        # a mean is off by 2^-33 at most, which sigma and K = 4 directions make 2^-33 / 1e-4 of a slope
        torch.testing.assert_close(weights(secure.module)[name], value, rtol=0, atol=0.1 * 4.4 * 2.0**-33 / 1e-4 + 1e-6)
    assert secure.history[0]["bytes_up"] == plain.history[0]["bytes_up"] + 8


def test_uploads_do_not_depend_on_the_size_of_the_module():
    class Wide(Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 600), torch.nn.Tanh(), torch.nn.Linear(600, 3))

    small, wide = federation(2), federation(2, module=Wide())
    up = {run.fit()[-1]["bytes_up"] for run in (small, wide)}
    assert up == {8 * 4 + 32}
    assert wide.history[-1]["bytes_down"] > 10 * small.history[-1]["bytes_down"]
    # with numbers down, both directions: 8 K for the means, 8 for the seed, three numbers and two hashes
    down = {
        run.fit()[-1]["bytes_down"]
        for run in (federation(2, downlink="numbers"), federation(2, module=Wide(), downlink="numbers"))
    }
    assert down == {8 * 4 + 8 + 24 + 64}


def test_gradients_by_backprop_are_those_of_the_union_batch():
    run = federation(3, method=FedAvg("gradients"), ema=0.0)
    run.fit()
    data, alone = Data(), Module()
    optimizer = alone.configure_optimizers()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(alone.net(data.x), data.y).backward()
        optimizer.step()
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(run.module)[name], value, rtol=1e-5, atol=1e-6)


def test_averaging_one_client_is_plain_training():
    run = federation(1, method=FedAvg(), num_clients=1, ema=0.0)
    run.fit()
    alone = Module()
    optimizer = alone.configure_optimizers()
    for (x, y), _ in run.clients[0]._batches(round_seed(0, 1), 0):
        optimizer.zero_grad()
        F.cross_entropy(alone.net(x), y).backward()
        optimizer.step()
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(run.module)[name], value, rtol=1e-5, atol=1e-6)


def test_a_late_answer_is_left_out_of_the_next_round():
    run = federation(6, straggler=0.5)
    reports = []
    finish = run.server.finish
    run.server.finish = lambda replies: reports.append(finish(replies)) or reports[-1]
    run.fit()
    reasons = [reason for report in reports for reason in report.left_out.values()]
    assert any("it answers round 1 with seed" in reason for reason in reasons)
    assert all(row["clients"] + row["left_out"] == 5 for row in run.history)


def test_evaluation_uses_the_average_and_leaves_the_weights():
    run = federation(3, evaluate_every=2)
    run.fit()
    assert ["val_acc" in row for row in run.history] == [False, True, True]
    before = weights(run.module)
    average = run.server.average
    found = run.test()["test_acc"]
    assert_equal(before, weights(run.module))
    module, data = Module(), Data()
    module.load_state_dict({**module.state_dict(), **average})
    assert found == pytest.approx(float((module.net(data.x).argmax(1) == data.y).float().mean()))
    with pytest.raises(ValueError, match="evaluate_every=0: give 1 or more"):
        federation().test()


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_robust_means_stay_among_the_honest(name):
    pytest.importorskip("flwr")
    from lightning_bpfree.federated.robust import Robust

    honest = torch.randn(6, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers = torch.cat([honest, torch.full((1, 1, 5), 50.0)])
    found = Robust(name)(numbers, torch.ones(7))
    assert found.shape == (1, 5)
    assert (found >= honest.min(0).values).all()
    assert (found <= honest.max(0).values).all()
    if name == "krum":
        assert any(torch.equal(found, own) for own in honest)
    if name == "median":
        torch.testing.assert_close(found, numbers.median(0).values)


def test_a_client_that_lies_moves_a_median_little():
    pytest.importorskip("flwr")
    settings = {"method": Baffle(4, 1e-2), "ema": 0.0}

    def distance(robust):
        run, honest = federation(3, robust=robust, **settings), federation(3, **settings)
        measured = run.clients[2].measured
        run.clients[2].measured = lambda *args: (measured(*args)[0] * 0 + 1.0, *measured(*args)[1:])  # believable
        run.fit(), honest.fit()
        mine, theirs = weights(run.module), weights(honest.module)
        return float(sum((mine[n] - theirs[n]).square().sum() for n in mine) ** 0.5)

    assert distance("median") < 0.5 * distance(None)


BAD = {
    "secure": ({"secure": True, "method": FedAvg()}, "secure=True needs numbers along directions that clients share"),
    "privacy": ({"privacy": Privacy(), "method": Baffle(noise="per_client")}, "privacy=.* use method=Baffle"),
    "robust": ({"robust": "median", "secure": True}, "robust='median' with secure=True"),
    "downlink": ({"downlink": "numbers", "method": Baffle(noise="per_client")}, "downlink='numbers' needs numbers"),
    "min_clients": ({"min_clients": 11}, "min_clients=11: there are num_clients=10; give fewer"),
    "one client": ({"secure": True, "fraction": 0.01}, "secure=True needs two clients in a round"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_do_not_go_together(name):
    settings, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Federation(**settings)


def test_values_out_of_range():
    with pytest.raises(ValueError, match=r"num_directions=0: give a whole number in \[1, 65536\]"):
        Baffle(0)
    with pytest.raises(ValueError, match="num_directions=100000"):
        Baffle(100_000)
    with pytest.raises(ValueError, match="sigma=0: give a positive number"):
        Baffle(sigma=0)
    with pytest.raises(ValueError, match=r"sigma=1e-06: lost in the rounding of torch.float32: give at least 3e-05"):
        Federation(Baffle(sigma=1e-6)).server(Module())
    frozen = Module()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Federation().server(frozen)
    with pytest.raises(ValueError, match="local_steps=2: a sample counts once"):
        federation(method=Baffle(local_steps=2), privacy=Privacy(seed=1))


class TwoOptimizers(Module):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)], []


class NeedsTrainer(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.trainer.max_epochs)


class Scheduled(Module):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1.0)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)}


def test_optimizers():
    with pytest.raises(ValueError, match="configure_optimizers returned 2 optimizers"):
        Federation().server(TwoOptimizers())
    with pytest.raises(ValueError, match="configure_optimizers needs a Trainer, and a federation has none"):
        Federation().server(NeedsTrainer())
    run = federation(2, module=Scheduled())
    run.fit()
    assert run.server.update.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)  # a scheduler steps once a round
