"""A chain of layers, its batches and steps, for the tests of local guesses."""

from functools import partial

import torch
import torch.nn.functional as F
from problems import Problem, fitted, loader
from torch import nn

from lightning_bpfree import LocalLoss

FROZEN = partial(LocalLoss, update="freeze")
SPACES = ["weights", "activations"]
BLOCKS = {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}  # of `chain`; net.4 is the exact part


def chain(dtype=torch.float64):
    torch.manual_seed(5)
    layers = [nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).to(dtype)


def data_in(dtype, **how):
    data = loader(**{"rows": 16, **how})
    data.dataset.tensors = (data.dataset.tensors[0].to(dtype), data.dataset.tensors[1])
    return data


def steps(rule, net=None, kind=Problem, dtype=torch.float64, data=None, **settings):
    """The gradients of every step of one epoch at a learning rate of 0."""
    module = kind(chain(dtype) if net is None else net, lr=0.0)
    precision = {torch.float64: "64-true", torch.float32: "32-true"}[dtype]
    fitted(module, data_in(dtype) if data is None else data, rule, precision=precision, **settings)
    return module.gradients


def step(rule, **how):
    return steps(rule, **how)[0]


def part(gradients, names=BLOCKS):
    return {name: gradients[name] for name in sorted(names)}


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


class Watches(Problem):
    """Keeps the gradients at the outputs of the blocks of `chain`."""

    def at_blocks(self, data):
        found = {}

        def keep(j, module, args, out):
            out.register_hook(lambda grad: found.update({j: grad}))

        handles = [self.net[i].register_forward_hook(partial(keep, j)) for j, i in enumerate((1, 3))]
        x, y = next(iter(data))
        self.loss(self.net(x), y).backward()
        for handle in handles:
            handle.remove()
        self.zero_grad()
        return found

    def loss(self, logits, labels):
        return F.cross_entropy(logits, labels)

    def training_step(self, batch, index):
        return self.loss(self.net(batch[0]), batch[1])


class Coupled(Watches):
    """A loss in which samples see each other, at the output of the network."""

    def loss(self, logits, labels):
        return F.cross_entropy(logits - logits.mean(0), labels) + (logits @ logits.T).square().mean()


def head_of(rule, role="guess", block=0):
    """Weight and bias of a linear head."""
    return list(rule.rule_state()["guided"][role].values())[block]["module"]
