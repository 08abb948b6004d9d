"""Routes of EvolutionStrategy agree: members one by one, vectorized, and layer by layer."""

from __future__ import annotations

import logging
import secrets

import pytest
import torch
import torch.nn.functional as F
from evolution_problems import Net, batches
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from torch import nn

from lightning_bpfree import SNES, EvolutionStrategy, OpenAIES
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.methods.evolution_strategy.population.low_rank_layers import LowRankLayers


def gradients_of(net: nn.Module, data, rule: EvolutionStrategy) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = Net(net)
    fitted(module, data, rule)
    return module.gradients[0]


# --- routes ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Attention uses the weight of its output layer without calling it; the last layer is called and used beside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 32)
        self.head = nn.Linear(32, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        h = self.head(torch.relu(self.up(h)))
        h = h + torch.relu(h @ self.head.weight)[..., :8]  # beside its own layer
        return self.out(h.mean(1))


class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 6, 5, padding="same", dilation=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean(-1))


NETS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 3)),
        batches(6),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)),
        batches(6),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, stride=2, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),
            nn.Conv2d(8, 8, 1, groups=4),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        batches(2, 8, 8),
    ),
    "conv1d": (OneDimensional, batches(2, 9)),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3), nn.Flatten()), batches(1, 6)),
    "attention": (Attention, batches(5, integers=11)),
}


@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("name", NETS)
def test_vectorised_populations_equal_the_loop(name, rank):
    make, data = NETS[name]
    torch.manual_seed(1)
    net = make()
    settings = {"algorithm": OpenAIES(sigma=0.1, shaping="raw"), "population_size": 12, "rank": rank, "seed": 5}
    loop = gradients_of(net, data, EvolutionStrategy(**settings, chunk_size=1))
    for chunk in (5, 12):
        many = gradients_of(net, data, EvolutionStrategy(**settings, chunk_size=chunk))
        for key, gradient in loop.items():
            # Losses of about 1 in float32 differ by some 1e-7, over sigma = 0.1, times noise up to 4.
            torch.testing.assert_close(many[key], gradient, rtol=1e-4, atol=2e-5)


def test_the_layers_compute_alike_without_vmap_from_within(monkeypatch):
    from lightning_bpfree.methods.evolution_strategy.population import low_rank_layers as low_rank

    for name in ("mlp", "cnn", "conv1d", "sequence", "attention"):
        make, data = NETS[name]
        torch.manual_seed(1)
        net = make()
        rule = lambda: EvolutionStrategy(OpenAIES(0.1, "raw"), 8, rank=1, seed=5, chunk_size=8)  # noqa: E731
        fast = gradients_of(net, data, rule())
        with monkeypatch.context() as patched:
            patched.setattr(low_rank, "_INSIDE_VMAP", False)
            slow = gradients_of(net, data, rule())
        for key, gradient in slow.items():
            torch.testing.assert_close(fast[key], gradient, rtol=1e-4, atol=2e-5)


def test_layers_that_something_else_reads_are_found_and_said(caplog):
    torch.manual_seed(1)
    net = Attention()
    with caplog.at_level(logging.INFO):
        gradients_of(net, NETS["attention"][1], EvolutionStrategy(OpenAIES(0.1), 8, rank=1, chunk_size=8))
    lines = [record.message for record in caplog.records if "a matrix of noise for each member" in record.message]
    assert len(lines) == 1
    for used in ("net.attention.in_proj_weight", "net.attention.out_proj.weight", "net.head.weight"):
        assert used in lines[0]
    for own in ("net.embed.weight", "net.up.weight", "net.out.weight"):
        assert own not in lines[0]


class PenalizedLate(Net):
    """Adds a penalty on a weight from its third batch on, in the middle of an epoch."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss + self.net[0].weight.square().sum() if index >= 2 else loss


def test_a_weight_that_something_else_uses_later_in_an_epoch_has_its_noise_there():
    def run(chunk_size):
        torch.manual_seed(1)
        module = PenalizedLate(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
        fitted(
            module, batches(6, num=4), EvolutionStrategy(OpenAIES(0.1, "raw"), 8, rank=1, chunk_size=chunk_size, seed=5)
        )
        return module.gradients

    for fast, slow in zip(run(8), run(1), strict=True):
        for name, gradient in slow.items():
            torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=2e-5)  # float32, sums in another order


def test_tied_frozen_and_reshaped_layers_are_not_standard():
    shared = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    shared[1].weight = shared[0].weight

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.ModuleDict(
        {
            "shared": shared,
            "doubled": Doubled(9, 9),
            "circular": nn.Conv2d(9, 9, 3, padding_mode="circular"),
            "bounded": nn.Embedding(9, 9, max_norm=1.0),
            "plain": nn.Linear(9, 9),
        }
    )
    slots = ParameterSlots(net)
    assert LowRankLayers(slots, {slot.name for slot in slots}).names == {"plain.weight"}


def test_routes_by_structure(caplog):
    small = Net(nn.Linear(6, 3))
    rule = EvolutionStrategy(population_size=16)
    fitted(small, batches(6), rule)
    assert rule._passes.chosen == 16

    class Reads(Net):
        def training_step(self, batch, index):
            return super().training_step(batch, index).item()

    rule = EvolutionStrategy(population_size=16)
    with caplog.at_level(logging.INFO):
        fitted(Reads(nn.Linear(6, 3)), batches(6), rule)
    assert rule._passes.chosen == 1
    assert "members one by one, because vectorizing fails" in caplog.text
    rule = EvolutionStrategy(population_size=16)
    fitted(Net(NETS["cnn"][0]()), NETS["cnn"][1], rule)
    assert rule._passes.chosen == 1
    rule = EvolutionStrategy(population_size=16, chunk_size="fastest")
    fitted(Net(NETS["cnn"][0]()), NETS["cnn"][1], rule)
    assert "one by one: chunk_size=" in caplog.text or rule._passes.chosen in (1, 16)


def test_forward_passes_are_counted():
    for chunk in (1, 4, "auto"):
        rule = EvolutionStrategy(population_size=8, chunk_size=chunk)
        fitted(Net(nn.Linear(6, 3)), batches(6, num=3), rule)
        assert rule.record.forward_evals == 3 * 9


# --- what vectorizing may get wrong ----------------------------------------------------------------------------------


class Later(Net):
    """Uses a weight beside its layer from the second epoch on."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss + self.net[0].weight.square().sum() if self.current_epoch else loss


class Teacher(Net):
    """Calls the same layers with other weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.other = {name: p.detach() + 0.5 for name, p in net.named_parameters()}

    def training_step(self, batch, index):
        target = torch.func.functional_call(self.net, self.other, (batch[0],))
        return F.mse_loss(self.net(batch[0]), target)


@pytest.mark.parametrize("kind", [Later, Teacher])
def test_noise_follows_the_use_of_a_weight(kind):
    found = {}
    for chunk in (1, 8, "auto"):
        torch.manual_seed(0)
        module = kind(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)))
        rule = EvolutionStrategy(OpenAIES(0.1, "raw"), 8, rank=1, seed=3, chunk_size=chunk)
        fitted(module, batches(6), rule, max_epochs=2)
        found[chunk] = module.gradients[-1]
    for key, gradient in found[1].items():
        torch.testing.assert_close(found[8][key], gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["auto"][key], gradient, rtol=1e-4, atol=1e-4)


def test_losses_that_differ_when_vectorised_are_not_believed(caplog):
    class OwnNoise(Net):
        def training_step(self, batch, index):
            return super().training_step(batch, index) + secrets.randbelow(1000) / 1000  # no stream that goes back

    with pytest.raises(MisconfigurationException, match=r"chunk_size=8.*Use chunk_size=1"):
        fitted(OwnNoise(nn.Linear(6, 3)), batches(6), EvolutionStrategy(population_size=8, chunk_size=8))
    rule = EvolutionStrategy(population_size=8)
    with caplog.at_level(logging.INFO):
        fitted(OwnNoise(nn.Linear(6, 3)), batches(6), rule)
    assert "because vectorized members have different losses" in caplog.text
    assert rule._passes.chosen == 1


def test_counts_are_rewards_and_bare_errors_are_no_obstacle():
    class Count(Net):
        def training_step(self, batch, index):
            assert not torch._C._functorch.is_batchedtensor(self.net.weight)
            return {
                "loss": super().training_step(batch, index),
                "right": (self.net(batch[0]).argmax(-1) == batch[1]).sum(),
            }

    rule = EvolutionStrategy(SNES(sigma=1.0), 16, objective="right", maximize=True)
    fitted(Count(nn.Linear(6, 3)), batches(6), rule)
    assert rule._passes.chosen == 1


def test_masks_of_no_parameter_are_errors():
    rule = EvolutionStrategy("snes", 8)
    fitted(Net(nn.Linear(6, 3)), batches(6), rule)
    with pytest.raises(ValueError, match=r"there are masks for net\.missing, but no parameters"):
        rule.restrict({"net.missing": torch.ones(3, 6) > 0})
