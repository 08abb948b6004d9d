"""Splits of a training set, and BatchNorm, which is found and replaced."""

import pytest
import torch
from federated_problems import Data, Module
from torch import nn

from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.normalization import replace_batch_norm
from lightning_bpfree.federated.partition import LocalData, Partition, dirichlet_partition, iid_partition

LABELS = torch.arange(600) % 6


@pytest.mark.parametrize(
    "parts", [iid_partition(600, 7), dirichlet_partition(LABELS, 7, 0.3), dirichlet_partition(LABELS, 7, 100.0)]
)
def test_every_sample_has_one_client(parts):
    assert sorted(index for part in parts for index in part) == list(range(600))


def shares(alpha):
    parts = dirichlet_partition(LABELS, 5, alpha, seed=1)
    counts = torch.stack([torch.bincount(LABELS[part], minlength=6) for part in parts]).float()
    return counts / counts.sum(0)


def test_alpha_says_how_unequal_clients_are():
    assert float((shares(1000.0) - 0.2).abs().max()) < 0.07  # nearly even
    assert float((shares(0.1) - 0.2).abs().max()) > 0.6
    assert torch.equal(shares(0.3), shares(0.3))


def test_clients_without_data_are_refused():
    with pytest.raises(ValueError, match=r"num_clients=700: there are 600 samples, .* give as many clients as samples"):
        iid_partition(600, 700)
    with pytest.raises(ValueError, match=r"alpha=0.01: in 100 draws a client had fewer than min_samples=1"):
        dirichlet_partition(torch.zeros(20, dtype=torch.int64), 15, 0.01)
    with pytest.raises(ValueError, match="min_samples=500"):
        dirichlet_partition(LABELS, 4, 1.0, min_samples=500)
    with pytest.raises(ValueError, match=r"indices=\[\]: the client has no samples"):
        LocalData(Data().train_dataloader().dataset, [], 5, lambda samples: samples)
    with pytest.raises(ValueError, match="client 3 of 3: numbers are from 0 to 2"):
        Partition(Data(), 3).client(3)


def test_dirichlet_needs_labels():
    class Regression(Data):
        def __init__(self):
            super().__init__()
            self.y = torch.randn(40)

    with pytest.raises(ValueError, match="alpha splits by classes, for which batches must be pairs"):
        Partition(Regression(), 3, alpha=0.3)
    assert [len(part) for part in Partition(Regression(), 4).indices] == [10] * 4


def test_poisson_draws_have_their_rate():
    part = Partition(Data(num=2000), 1).client(0)
    sizes = [
        sum(
            size
            for _, size in part.drawn(torch.rand(2000, generator=torch.Generator().manual_seed(seed)).tolist(), 0.3)
        )
        for seed in range(20)
    ]
    assert abs(sum(sizes) / 20 - 600) < 4 * (2000 * 0.21 / 20) ** 0.5  # four standard errors
    assert sum(size for _, size in part.drawn([0.999] * 2000, 1.0)) == 2000


def test_batch_norm_left_in_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"module=Module: BatchNorm in net.1: .*replace_batch_norm\(module\)"):
        Federation(num_clients=2).server(Module(norm=True))
    module = Module(norm=True)
    (row,) = replace_batch_norm(module)
    assert str(row) == "net.1: BatchNorm1d(6) -> GroupNorm(2 groups, without scale and shift)"
    Federation(num_clients=2).server(module)


def test_group_norm_has_the_paper_s_groups():
    net = nn.Sequential(nn.Conv2d(1, 48, 3), nn.BatchNorm2d(48), nn.Conv2d(48, 7, 3), nn.BatchNorm2d(7))
    assert [row.groups for row in replace_batch_norm(net)] == [3, 1]  # 7 channels have no other divisor below 2
    assert [type(part).__name__ for part in net] == ["Conv2d", "GroupNorm", "Conv2d", "GroupNorm"]
    assert net[1].weight is None
    affine = nn.Sequential(nn.BatchNorm1d(8))
    replace_batch_norm(affine, groups=4, affine=True)
    assert affine[0].weight is not None
    with pytest.raises(ValueError, match="groups=5: 0 has 8 channels, which do not divide"):
        replace_batch_norm(nn.Sequential(nn.BatchNorm1d(8)), groups=5)
