"""Parameters of unusual kinds train exactly, or are refused: sparse gradients, complex ones, lazy layers."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from differentiating_modules import (
    WITHOUT_BACKWARD,
    AllDirections,
    Classifier,
    every_rule,
)
from foreign_problems import RULES, Small, vector_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from thinned import in_turn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

# --- sparse gradients ------------------------------------------------------------------------------------------------


class Words(Small):
    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__()
        self.words, self.head, self.kind = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3), optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.words(batch[0]).mean(1)), batch[1])

    def configure_optimizers(self):
        return self.kind([self.words.weight] if self.kind is torch.optim.SparseAdam else self.parameters(), lr=0.1)


def word_data() -> DataLoader:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, (12, 5), generator=draw)
    return DataLoader(TensorDataset(ids, torch.randint(3, (12,), generator=draw)), batch_size=4)


class Norms(pl.Callback):
    def __init__(self) -> None:
        self.wrong: list[float] = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        dense = [p.grad.to_dense() for p in module.parameters()]
        expected = torch.cat([grad.flatten() for grad in dense]).norm()
        self.wrong.append(float((trainer.logged_metrics["bpfree/grad_norm"] - expected).abs() / expected))


def test_the_norm_of_sparse_gradients_is_logged_and_compared():
    norms, measured = Norms(), bpf.GradientAlignment(1)
    fitted(Words(), word_data(), bpf.Backprop(), measured, norms)
    assert len(norms.wrong) == 3
    assert max(norms.wrong) < 1e-6  # float32
    assert abs(measured.mean_cosine - 1) < 1e-6


def test_sparse_adam_goes_on_under_backprop():
    module = Words(torch.optim.SparseAdam)
    before = module.words.weight.detach().clone()
    fitted(module, word_data(), bpf.Backprop())
    assert not torch.equal(before, module.words.weight)


@every_rule
def test_sparse_embeddings_train(rule):
    module = Words()
    before = module.words.weight.detach().clone()
    fitted(module, word_data(), WITHOUT_BACKWARD[rule]())
    assert not torch.equal(before, module.words.weight)


@every_rule
def test_sparse_adam_is_refused_with_the_cure(rule):
    with pytest.raises(MisconfigurationException, match=r"words\.weight.*torch\.optim\.Adam"):
        fitted(Words(torch.optim.SparseAdam), word_data(), WITHOUT_BACKWARD[rule]())


# --- complex parameters, and such without dimensions -----------------------------------------------------------------


class Waves(Small):
    """A filter in frequency space, with complex weights and a real scale without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.tensor(1.0 + 1.0j))
        self.head = nn.Linear(6, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = torch.fft.irfft(torch.fft.rfft(batch[0]) * self.filter * self.phase, n=6)
        return F.cross_entropy(self.head(x * self.scale), batch[1])


class InDoubles(Waves):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(self.filter.detach().to(torch.complex128))
        self.phase = nn.Parameter(self.phase.detach().to(torch.complex128))


@every_rule
def test_both_parts_of_complex_numbers_move(rule):
    module = Waves()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fitted(module, vector_data(), WITHOUT_BACKWARD[rule](), max_epochs=2)
    for name in ("filter", "phase"):
        moved = getattr(module, name).detach() - before[name]
        assert bool((moved.real != 0).all()), name
        assert bool((moved.imag != 0).all()), name
    assert not torch.equal(module.scale, before["scale"])


@pytest.mark.parametrize("rule", ["forward", "loop", "central"])
def test_the_gradient_of_complex_parameters_is_exact_along_all_directions(rule):
    module = InDoubles()
    coordinates = 1 + 2 * 4 + 2 + 18 + 3
    rules = {
        "forward": lambda: bpf.ForwardGradient(coordinates, orthogonal=True),
        "loop": lambda: bpf.ForwardGradient(coordinates, orthogonal=True, chunk_size=1),
        "central": lambda: bpf.ZerothOrder(coordinates, sigma=1e-4, orthogonal=True),
    }
    fitted(module, vector_data(), rules[rule](), AllDirections(), limit_train_batches=1, precision="64-true")


def test_directions_have_two_coordinates_for_a_complex_number():
    from lightning_bpfree.core.directions import Directions

    like = {"z": torch.zeros(2000, dtype=torch.complex128), "s": torch.zeros(())}
    for distribution in ("gaussian", "rademacher"):
        drawn = Directions(like, 1, 0, distribution)[0]
        parts = torch.view_as_real(drawn["z"])
        assert drawn["s"].shape == ()
        # Four standard errors of a mean of squares: 4 sqrt(2 / 2000).
        assert torch.allclose(parts.square().mean(0), torch.ones(2, dtype=torch.float64), atol=0.13)
        assert abs(float((parts[:, 0] * parts[:, 1]).mean())) < 4 / 2000**0.5


def test_low_rank_noise_of_complex_weights_is_refused():
    with pytest.raises(ValueError, match="rank=None"):
        fitted(Waves(), vector_data(), bpf.EvolutionStrategy(population_size=8, rank=1))


class Scaled(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def logits(self, x):
        return self.net(x) * self.scale


SCALED = {
    **WITHOUT_BACKWARD,
    **{name: (lambda name=name: bpf.EvolutionStrategy(name, population_size=8)) for name in
       ("openai_es", "pgpe", "snes", "sep_cma_es", "des")},
    "low_rank": lambda: bpf.EvolutionStrategy(population_size=8, rank=1),
    "low_rank_loop": lambda: bpf.EvolutionStrategy(population_size=8, rank=1, chunk_size=1),
    "es_loop": lambda: bpf.EvolutionStrategy("snes", population_size=8, chunk_size=1),
    "normalized": lambda: bpf.ForwardGradient(2, normalize=True),
    "orthogonal": lambda: bpf.ZerothOrder(2, orthogonal=True, directions="rademacher"),
    "backprop": bpf.Backprop,
}  # fmt: skip


@pytest.mark.parametrize("rule", SCALED)
def test_parameters_without_dimensions_train(rule):
    module = Scaled()
    fitted(module, vector_data(), SCALED[rule]())
    assert module.scale.shape == ()
    assert float(module.scale.detach()) != 1.0


# --- lazy layers -----------------------------------------------------------------------------------------------------


LAZY = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3)),
    "mixed": lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.LazyLinear(3)),
    "batch_norm": lambda: nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.LazyConv1d(2, 3), nn.Flatten(), nn.LazyLinear(3)),
}


@pytest.mark.parametrize(("net", "rule"), in_turn(LAZY, [*WITHOUT_BACKWARD, "backprop"], fast=2))
def test_lazy_layers_train(net, rule):
    module = Classifier(LAZY[net]())
    seen = []

    class Sees(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(all(p.grad is not None for p in pl_module.parameters()))

    made = bpf.Backprop() if rule == "backprop" else WITHOUT_BACKWARD[rule]()
    fitted(module, vector_data(), made, Sees())
    assert seen == [True] * 3
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_lazy_layers_under_rules_for_networks_train_or_are_refused_with_the_cure():
    wrong = {}
    for name in RULES:
        try:
            fitted(Classifier(LAZY["linear"]()), vector_data(), RULES[name]())
        except MisconfigurationException:
            continue
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    assert not wrong
