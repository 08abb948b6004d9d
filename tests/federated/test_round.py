"""One round: what clients measure and what the server makes of it."""

import itertools
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from federated_problems import Data, Module, assert_equal, federation, run, weights
from reversible_problems import Live
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.finite_differences import difference_quotients
from lightning_bpfree.core.params import dot
from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.partition import LocalData, Partition
from lightning_bpfree.federated.server import BaffleServer
from lightning_bpfree.federated.settings import Baffle, round_seed
from lightning_bpfree.federated.update import aggregated_gradient, clipped

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("generator", ["device", "portable"])
def test_a_round_equals_zeroth_order_on_the_union_batch(scheme, generator):
    """Clients of unequal sizes, in several batches each; float64, so that differences of losses keep their digits."""
    settings = Baffle(8, 1e-3, scheme, generator=generator, clip=None)
    server, clients = federation(settings, module=Module().double())
    for client in clients:
        client.loss.module.double()
        client.data.dataset = TensorDataset(client.data.dataset.tensors[0].double(), client.data.dataset.tensors[1])
    # the types have changed, and the directions with them
    server = BaffleServer(server.module, settings, 11)
    for client in clients:
        client.fingerprint = server.fingerprint
    run(server, clients, rounds=3)
    data, alone = Data(), Module().double()
    if generator == "portable":
        for number in (1, 2, 3):  # ZerothOrder draws by the device's generator: here its formula with the other one
            params = {name: param.detach() for name, param in alone.named_parameters()}
            drawn = settings.drawn(params, round_seed(11, number))

            def loss(at):
                found = torch.func.functional_call(alone.net, {n[4:]: p for n, p in at.items()}, (data.x.double(),))
                return F.cross_entropy(found, data.y)

            base = loss(params) if scheme == "forward" else None
            slopes = difference_quotients(loss, params, drawn, 1e-3, base_loss=base)
            for name, gradient in drawn.combine(slopes / 8).items():
                params[name].sub_(gradient, alpha=0.1)
    else:
        rule = bpf.ZerothOrder(8, 1e-3, scheme, seed=11)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[rule],
        )
        alone.validation_step = None  # there is nothing to validate on
        trainer.fit(alone, DataLoader(TensorDataset(data.x.double(), data.y), 40))
    for name, value in weights(alone).items():
        # equal mathematics in float64, but losses are summed in another order before 1e-3 divides them
        torch.testing.assert_close(weights(server.module)[name], value, rtol=1e-9, atol=1e-11)


def test_many_directions_at_once_measure_what_they_do_one_by_one():
    found = {}
    for chunk in (1, 3):
        for scheme in ("forward", "central"):
            _, clients = federation(Baffle(5, 1e-2, scheme, chunk_size=chunk))
            found[chunk, scheme] = clients[0].measured(7, 0)[0]
    for scheme in ("forward", "central"):
        # float32 losses near 1, whose rounding is 1e-7, summed in another order
        torch.testing.assert_close(found[1, scheme], found[3, scheme], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_layer_by_layer_measures_what_a_copy_does(scheme):
    _, (copied, *_) = federation(Baffle(5, 1e-2, scheme))
    _, (layered, *_) = federation(Baffle(5, 1e-2, scheme, perturb="layers"))
    before = weights(layered.loss.module)
    # the same bits: the losses are, and differences are taken in float64 here, in float32 there
    torch.testing.assert_close(copied.measured(7, 0)[0], layered.measured(7, 0)[0], rtol=0, atol=2e-7)
    assert_equal(before, weights(layered.loss.module))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in layered.loss.module.modules())


class Reaching(Module):
    """Uses a layer's weight outside of that layer."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.net[0].weight.square().sum()


class Recurring(Module):
    """Calls a layer within itself, so that its parameters are put back while it still computes."""

    class Layer(torch.nn.Linear):
        def forward(self, x, again=True):
            inner = self(x, again=False) if again else x
            return torch.nn.functional.linear(x, self.weight, self.bias) + (inner if again else 0)

    def __init__(self):
        super().__init__()
        self.net[0] = self.Layer(4, 6)


def client_of(module, settings):
    collate = Data().train_dataloader().collate_fn
    data = LocalData(TensorDataset(Data().x, Data().y), range(10), 10, collate)
    return BaffleClient(module, data, settings, 0)


@pytest.mark.parametrize("kind", [Reaching, Recurring])
def test_layer_by_layer_finds_parameters_that_are_used_elsewhere(kind):
    client = client_of(kind(), Baffle(2, 1e-2, perturb="layers"))
    with pytest.raises(ValueError, match=r"perturb='layers': some parameters are used outside .* Use perturb='auto'"):
        client.measured(7, 0)
    found, copied = (client_of(kind(), Baffle(2, 1e-2, perturb=how)).measured(7, 0) for how in ("auto", "copy"))
    assert torch.equal(found[0], copied[0])
    assert found[2] == copied[2] == 3  # the look at the module is no part of the round
    with pytest.raises(ValueError, match="chunk_size=2: perturb='layers' needs"):
        Baffle(2, perturb="layers", chunk_size=2)


def test_the_default_perturbs_layer_by_layer_where_it_can():
    _, (plain, *_) = federation(Baffle(5, 1e-2))
    _, (layered, *_) = federation(Baffle(5, 1e-2, perturb="layers"))
    for number in (7, 8):
        assert torch.equal(plain.measured(number, 0)[0], layered.measured(number, 0)[0])
    for other in (Baffle(generator="device"), Baffle(chunk_size=2), Baffle(local_steps=2), Baffle(perturb="copy")):
        assert not other.layerwise


@pytest.mark.parametrize("way", ["in place", "around the version"])
def test_a_step_that_writes_to_what_is_trained_is_refused(way):
    class Writing(Module):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                weight = self.net[0].weight
                (weight if way == "in place" else weight.data).mul_(0.5)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"training_step writes to net.0.weight, which are trained: move that"):
        client_of(Writing(), Baffle(2)).measured(1, 0)


def test_a_round_takes_the_memory_of_inference():
    """At any depth, with parameters that are larger than the activations; those are not counted."""

    class Deep(Module):
        def __init__(self, depth):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 64), *(torch.nn.Linear(64, 64) for _ in range(depth)))

        def training_step(self, batch, batch_idx):
            return self.net(batch[0].repeat(100, 1)).square().mean()

    for depth in (4, 16):
        client = client_of(Deep(depth), Baffle(2, 1e-2))
        batch, _ = client.chosen(1, 0)[0]
        with torch.no_grad(), Live() as inference:
            client.loss.module.training_step(batch, 0)
        for number in (1, 2):  # in the first one, it also finds out what the step writes to
            with Live() as baffle:
                client.measured(number, 0)
            assert baffle.peak <= 1.1 * inference.peak


def test_the_estimate_is_unbiased_along_the_true_gradient():
    """For a loss that is linear within sigma, <estimate, g> / |g|^2 has mean 1 and variance 2 / K in each round."""
    settings = Baffle(200, 1e-4, clip=None, chunk_size=100)
    _, clients = federation(settings)
    params = clients[0].loss.params
    data, module = Data(), Module()
    for client in clients:
        client.loss.module.double()
    F.cross_entropy(module.net(data.x), data.y).backward()
    gradient = {name: param.grad for name, param in module.named_parameters()}
    ratios = []
    for seed in range(4):
        shares = [len(client.data) / 40 for client in clients]
        for client in clients:
            client.data.dataset.tensors = (data.x.double(), data.y)
        numbers = {i: (s, c.measured(seed, i)[0]) for i, (s, c) in enumerate(zip(shares, clients, strict=True))}
        estimate = aggregated_gradient(clients[0].loss.params, settings, seed, numbers)
        estimate = {name: part.float() for name, part in estimate.items()}
        ratios.append(float(dot(estimate, gradient) / dot(gradient, gradient)))
    assert abs(sum(ratios) / 4 - 1) < 4 * (2 / 800) ** 0.5  # four standard errors
    assert set(params) == set(gradient)


def test_per_client_directions_differ_and_shared_ones_do_not():
    params = Module().state_dict()
    params.pop("calls")
    shared, own = Baffle(3), Baffle(3, noise="per_client")
    assert torch.equal(
        shared.drawn(params, 5, client=0)[0]["net.0.weight"], shared.drawn(params, 5, client=1)[0]["net.0.weight"]
    )
    assert not torch.equal(
        own.drawn(params, 5, client=0)[0]["net.0.weight"], own.drawn(params, 5, client=1)[0]["net.0.weight"]
    )
    numbers = {0: (0.25, torch.tensor([[1.0, 2.0, 3.0]])), 1: (0.75, torch.tensor([[0.5, -1.0, 0.0]]))}
    found = aggregated_gradient(params, own, 5, numbers)
    for name in params:
        expected = sum(
            share * own.drawn(params, 5, client=c)[k][name] * rows[0, k] / (3 * own.sigma)
            for c, (share, rows) in numbers.items()
            for k in range(3)
        )
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-2)  # numbers near 1e4, in float32


def test_local_steps_walk_and_the_server_adds_the_steps_up():
    settings = Baffle(4, 1e-2, local_steps=3, local_lr=0.5, clip=None)
    _, (client, *_) = federation(settings)
    before = weights(client.loss.module)
    rows, samples, _ = client.measured(7, 0)
    assert rows.shape == (3, 4)
    assert samples == 3 * 16
    assert_equal(before, weights(client.loss.module))
    steps = [settings.drawn(before, 7, step)[0]["net.0.weight"] for step in range(3)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(steps, 2))
    at = dict(before)
    for step in range(3):
        drawn = settings.drawn(at, 7, step)
        with client.loss.on(client.chosen(7, step), 0) as objective:
            base = objective(at)
            expected = [float(objective(drawn.moved(k, at, 1e-2)) - base) for k in range(4)]
        assert rows[step].tolist() == pytest.approx(expected, abs=1e-6)
        part = drawn.combine(rows[step] / (4 * 1e-2))
        at = {name: value - 0.5 * part[name] for name, value in at.items()}
    total = aggregated_gradient(before, settings, 7, {None: (1.0, rows)})
    walked = {name: (before[name] - at[name]) / 0.5 for name in before}
    for name in before:
        torch.testing.assert_close(total[name], walked[name], rtol=1e-4, atol=1e-5)  # differences of float32 weights


def test_the_client_leaves_no_trace_and_makes_no_graph():
    saved = []
    _, (client, *_) = federation(Baffle(3))
    module = client.loss.module
    before, stream = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        client.measured(5, 0)
    assert saved == []
    assert all(param.grad is None for param in module.parameters())
    assert_equal(before, module.state_dict())
    assert torch.equal(stream, torch.get_rng_state())


def test_all_directions_see_the_same_dropout():
    data = Data()
    collate = data.train_dataloader().collate_fn
    client = BaffleClient(
        Module(dropout=0.5), LocalData(TensorDataset(data.x, data.y), range(40), 40, collate), Baffle(3), 0
    )
    with client.loss.on(client.chosen(5, 0), 3) as objective:
        params = client.loss.params
        assert float(objective(params)) == float(objective(params))
        stack = {name: torch.stack([param] * 3) for name, param in params.items()}
        assert len(set(objective.stacked(stack).tolist())) == 1
    with client.loss.on(client.chosen(5, 0), 4) as objective:
        other = float(objective(params))
    with client.loss.on(client.chosen(5, 0), 3) as objective:
        assert float(objective(params)) != other


def test_clipping_scales_the_whole_estimate():
    gradient = {"a": torch.tensor([3.0, -6.0]), "b": torch.tensor([1.5])}
    assert [part.tolist() for part in clipped(gradient, 2.0).values()] == [[1.0, -2.0], [0.5]]
    assert clipped({"a": torch.tensor([0.5])}, 2.0)["a"].tolist() == [0.5]


def test_the_moving_average_follows_the_weights():
    server, clients = federation(Baffle(3), ema=0.5)
    start = server.params["net.0.weight"].clone()
    run(server, clients, 2)
    # decays min(0.5, (1 + n) / (10 + n)) for n = 1, 2
    first = weights(server.module)["net.0.weight"]
    assert not torch.equal(server.average["net.0.weight"], first)
    run_two = federation(Baffle(3))
    run(*run_two, 1)
    one = weights(run_two[0].module)["net.0.weight"]
    expected = (start * 2 / 11 + one * 9 / 11) * 3 / 12 + first * 9 / 12
    torch.testing.assert_close(server.average["net.0.weight"], expected, rtol=1e-5, atol=1e-6)


def test_partitions_feed_the_same_batches_again():
    part = Partition(Data(), 3, batch_size=4)
    one, two = (part.client(1).batches(5, 2) for _ in range(2))
    assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(one, two, strict=True))
    assert [size for _, size in one] == [4, 4]
    assert not torch.equal(one[0][0][0], part.client(1).batches(6, 2)[0][0][0])


@pytest.mark.slow  # processes that import torch and lightning
def test_processes_make_the_same_directions_with_any_number_of_threads():
    code = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from lightning_bpfree.federated.settings import Baffle, weights_digest
like = {"w": torch.zeros(300, 100), "b": torch.zeros(17)}
print(*[weights_digest(Baffle(2, generator=g).drawn(like, 9)[1]) for g in ("portable", "device")])
"""
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, n], capture_output=True, text=True, check=True
        ).stdout
        for n in ("1", "2")
    }
    assert len(found) == 1
