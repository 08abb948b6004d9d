"""Privacy: bounded contributions, noise of the promised size, and the accountant's figures."""

import math

import pytest
import torch
import torch.nn.functional as F
from federated_problems import Data, Module

from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.partition import Partition
from lightning_bpfree.federated.privacy import Privacy, PrivateClient
from lightning_bpfree.federated.secret_numbers import SecretNumbers
from lightning_bpfree.federated.settings import Baffle

pytest.importorskip("dp_accounting")
pytest.importorskip("cryptography")


def client(privacy, share=0.0, data=None, scheme="forward"):
    part = Partition(data or Data(), 2).client(0)
    return PrivateClient(Module(), part, Baffle(6, 1e-2, scheme, chunk_size=4), 0, privacy=privacy, share=share)


@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_without_noise_and_clip_it_is_the_mean_over_samples(scheme):
    own = client(Privacy(clip=1e9, seed=1), scheme=scheme)
    found, samples, _ = own.measured(5, 0)
    plain = super(PrivateClient, own).measured(5, 0)[0]
    assert samples == 20
    # float32 losses near 1 and their differences, summed in another order
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)


def test_every_sample_counts_for_no_more_than_the_clip():
    clip = 1e-3
    own = client(Privacy(clip=clip, seed=1))
    directions = own.settings.drawn(own.loss.params, 5, 0, 0)
    total = torch.zeros(6, dtype=torch.float64)
    for index in own.data.indices:
        x, y = own.data.dataset[index]

        def loss(params, x=x, y=y):
            return float(F.cross_entropy(torch.func.functional_call(own.loss.module.net, params, (x[None],)), y[None]))

        inner = {name[4:]: param for name, param in own.loss.params.items()}
        base = loss(inner)
        moved = [{n[4:]: p for n, p in directions.moved(k, own.loss.params, 1e-2).items()} for k in range(6)]
        row = torch.tensor([loss(at) - base for at in moved], dtype=torch.float64)
        assert float(row.norm()) > clip  # all are scaled down here
        total += row * clip / row.norm()
    torch.testing.assert_close(own.measured(5, 0)[0][0], total / 20, rtol=1e-3, atol=1e-6)


def test_the_noise_of_all_clients_has_the_promised_size():
    privacy, num = Privacy(clip=0.5, seed=None), 4
    quiet = client(Privacy(clip=0.5, seed=1)).measured(5, 0)[0]
    noisy = client(privacy, share=3.0 / num**0.5)
    loud = torch.cat([noisy.measured(5, 0)[0] for _ in range(60)])
    spread = float(((loud - quiet) * 20).std())
    expected = 3.0 * 0.5 / num**0.5
    assert abs(spread / expected - 1) < 4 / (2 * 360) ** 0.5  # four standard errors of a standard deviation
    assert not torch.equal(loud[0], loud[1])  # secret randomness


def test_secret_numbers_are_those_of_chacha20():
    # RFC 8439, appendix A.1, test vector 1
    words = [int.from_bytes(bytes.fromhex(part), "little") for part in ("76b8e0ada0f13d90", "405d6ae55386bd28")]
    assert SecretNumbers(bytes(32)).uniforms(2).tolist() == [((word >> 12) + 0.5) / 2**52 for word in words]


def test_secret_numbers_are_normal():
    found = SecretNumbers.of_seed(0).normals(100_000)
    assert abs(found.mean()) < 4 / 100_000**0.5  # four standard errors, here and below
    assert abs((found**2).mean() - 1) < 4 * (2 / 100_000) ** 0.5
    assert abs((found**4).mean() - 3) < 4 * (96 / 100_000) ** 0.5
    assert abs((found[1:] * found[:-1]).mean()) < 4 / 100_000**0.5


def test_noise_is_secret_and_does_not_follow_from_32_bits():
    """As torch's would: on a CPU its generator takes the lowest 32 bits of a seed alone."""
    privacy = Privacy(clip=0.5)
    torch.manual_seed(0)
    first = privacy.source(5, 0).normals(4)
    torch.manual_seed(0)
    assert (first != privacy.source(5, 0).normals(4)).all()
    one, other = (Privacy(seed=1).source(seed, 0).normals(4) for seed in (5, 5 + 2**32))
    assert (one != other).all()
    assert (one == Privacy(seed=1).source(5, 0).normals(4)).all()


def test_the_accountant_keeps_to_the_budget():
    privacy = Privacy(8.0, 1e-5, 0.1)
    noise = privacy.multiplier(60)
    assert 7.9 < privacy.spent([noise] * 60) <= 8.0
    assert privacy.spent([noise] * 59) < privacy.spent([noise] * 60)
    # Full batches: 60 Gaussian mechanisms are one whose noise is smaller by the root of 60. A bound by zCDP is larger.
    rho = 60 / (2 * noise**2)
    assert privacy.spent([noise] * 60) <= rho + 2 * math.sqrt(rho * math.log(1e5))
    assert privacy.spent([noise / 2] + [noise] * 59) > 8.0  # half of the clients were missing once
    assert privacy.spent([]) == 0.0
    assert privacy.spent([0.0]) == math.inf
    assert Privacy(8.0, 1e-5, 0.1, rate=0.1).multiplier(60) < noise


def test_a_federation_shares_the_noise_and_reports_epsilon():
    from lightning_bpfree.federated.in_process import InProcessFederation

    federation = Federation(Baffle(4, 1e-2), num_clients=4, privacy=Privacy(2.0, 1e-3, 0.1, seed=1))
    run = InProcessFederation(Module(), Data(), federation, 5, evaluate_every=0)
    assert run.clients[0].share == pytest.approx(run.noise / 2)
    history = run.fit()
    assert history[-1]["epsilon"] == pytest.approx(2.0, abs=0.02)
    assert [row["epsilon"] for row in history] == sorted(row["epsilon"] for row in history)
