"""Small modules and data for federations."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.partition import LocalData
from lightning_bpfree.federated.server import BaffleServer

FEATURES, CLASSES = 4, 3


class Data(pl.LightningDataModule):
    """Forty samples of three classes; validation and test are the training set."""

    def __init__(self, num=40, batch_size=5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num, FEATURES, generator=generator)
        self.y = self.x[:, :CLASSES].argmax(1)
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), 20)

    test_dataloader = val_dataloader


class Module(pl.LightningModule):
    """A small network with dropout, if asked for; notes how gradients are set when its loss is evaluated."""

    def __init__(self, lr=0.1, optimizer="sgd", dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(1)
        middle = [nn.BatchNorm1d(6)] if norm else []
        self.net = nn.Sequential(nn.Linear(FEATURES, 6), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, CLASSES))
        self.lr, self.kind = lr, optimizer
        self.register_buffer("calls", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.calls += 1
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean())

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_acc", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        if self.kind == "adam":
            return torch.optim.Adam(self.parameters(), self.lr)
        return torch.optim.SGD(self.parameters(), self.lr)


def weights(module):
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def assert_equal(one, two):
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def federation(settings, sizes=(16, 4, 20), module=None, **server):
    data = Data()
    cuts = torch.tensor(sizes).cumsum(0).tolist()
    starts = [0, *cuts[:-1]]
    collate = data.train_dataloader().collate_fn
    module = module or Module()
    dataset = TensorDataset(data.x, data.y)
    clients = [
        BaffleClient(Module(), LocalData(dataset, range(a, b), 7, collate), settings, i)
        for i, (a, b) in enumerate(zip(starts, cuts, strict=True))
    ]
    return BaffleServer(module, settings, 11, **server), clients


def run(server, clients, rounds=1):
    reports = []
    for _ in range(rounds):
        told = server.begin(range(len(clients)))
        reports.append(server.finish([client.answer(told[i]) for i, client in enumerate(clients)]))
    return reports
