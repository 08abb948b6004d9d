"""Steps that differentiate within themselves and parameters of unusual kinds train exactly, or are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from foreign_problems import RULES, Slopes, Small, vector_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

WITHOUT_BACKWARD: dict[str, Callable[[], bpf.TrainingRule]] = {
    "forward_gradient": lambda: bpf.ForwardGradient(2),
    "one_direction": lambda: bpf.ForwardGradient(1),
    "zeroth_order": lambda: bpf.ZerothOrder(2),
    "evolution": lambda: bpf.EvolutionStrategy(population_size=8),
    "evolution_snes": lambda: bpf.EvolutionStrategy("snes", population_size=8),
}
every_rule = pytest.mark.parametrize("rule", WITHOUT_BACKWARD)


class Classifier(Small):
    """A small classifier whose loss others change."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3) if net is None else net

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


# --- derivatives within the step -------------------------------------------------------------------------------------


class Physics(Classifier):
    """The derivative of the network by its input is a part of the loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope.sum(1) - u[:, 0]).square().mean()


class SecondDerivative(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return (second.sum(1) + first[:, 1]).square().mean()


class PenaltyOnParameters(Classifier):
    """The norm of the gradient by the parameters is a part of the loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        grads = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        return loss + sum(grad.square().sum() for grad in grads)


class SwitchesGradientsOn(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            u = self.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope.sum(1) - u[:, 0]).square().mean()


class FromTheThirdBatchOn(Physics):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return Classifier.training_step(self, batch, batch_idx) if batch_idx < 2 else super().training_step(batch, 0)


class Functional(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        slope = torch.func.grad(lambda x: self.net(x).sum())(batch[0])
        return (slope.sum(1) - self.net(batch[0])[:, 0]).square().mean()


DERIVATIVES = [
    Physics, SecondDerivative, PenaltyOnParameters, SwitchesGradientsOn, FromTheThirdBatchOn, Functional,
]  # fmt: skip
SLOPES: dict[str, Callable[[], bpf.TrainingRule]] = {
    "forward_gradient": lambda: bpf.ForwardGradient(2),
    "loop": lambda: bpf.ForwardGradient(2, chunk_size=1),
    "zeroth_order": lambda: bpf.ZerothOrder(2, sigma=1e-5),
}


def assert_slopes_are_exact(module: pl.LightningModule, data: DataLoader, rule: str) -> None:
    slopes = Slopes()
    fitted(module, data, SLOPES[rule](), slopes, limit_train_batches=3, precision="64-true")
    assert len(slopes.errors) == 3
    # Equal maths in float64; zeroth order: rounding 1e-16 / sigma and sigma^2 times the third derivative, all smooth.
    assert max(slopes.errors) < (1e-7 if rule == "zeroth_order" else 1e-10), slopes.errors


@pytest.mark.parametrize("rule", SLOPES)
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_slopes_are_exact_where_the_step_differentiates(kind, rule):
    assert_slopes_are_exact(kind(smooth()), vector_data(), rule)


@pytest.mark.parametrize("algorithm", ["openai_es", "snes"])
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_members_see_the_loss_that_differentiates(kind, algorithm):
    found = []
    for chunk_size in ("auto", 1):
        torch.manual_seed(1)
        module = kind(smooth())
        rule = bpf.EvolutionStrategy(algorithm, population_size=8, chunk_size=chunk_size)
        fitted(module, vector_data(), rule, limit_train_batches=3, precision="64-true")
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    # Losses are compared in float32, 6e-8 of them; centred ranks divide out the rest.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


class Measured(bpf.GradientAlignment):
    def _log(self, trainer, module, guess, truth):
        self.guess, self.truth = guess, truth
        super()._log(trainer, module, guess, truth)


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_the_true_gradient_beside_backprop_is_the_same(kind):
    measured = Measured(1)
    fitted(kind(smooth()), vector_data(), bpf.Backprop(), measured, limit_train_batches=3)
    assert measured.measured == 3
    assert abs(measured.mean_cosine - 1) < 1e-5  # equal maths in float32


@pytest.mark.parametrize("rule", [lambda: bpf.ForwardGradient(4, chunk_size=2),
                                  lambda: bpf.EvolutionStrategy(population_size=8, chunk_size=4)])  # fmt: skip
def test_a_chunk_size_beside_a_derivative_is_refused_with_the_cure(rule):
    with pytest.raises(MisconfigurationException, match=r"differentiates within itself.*chunk_size=1"):
        fitted(Physics(smooth()), vector_data(), rule())


# --- what only a backward pass would run -----------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float = 1.0) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return -ctx.factor * grad, None


reverse = Reverse.apply  # as people keep it


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.clamp(-1e-3, 1e-3)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Reverses(Classifier):
    def logits(self, x):
        return Reverse.apply(self.net(x))


class ReversesByAnotherName(Classifier):
    def logits(self, x):
        return reverse(self.net(x), 0.5)


class Clips(Classifier):
    def logits(self, x):
        return Clipped.apply(self.net(x))


class HooksOutputs(Classifier):
    def logits(self, x):
        y = self.net(x)
        y.register_hook(lambda grad: -grad)
        return y


class HooksWhereItCan(Classifier):
    def logits(self, x):
        y = self.net(x)
        if y.requires_grad:
            y.register_hook(lambda grad: -grad)
        return y


class HooksWeightsInTheStep(Classifier):
    def logits(self, x):
        self.net.weight.register_hook(lambda grad: -grad)
        return self.net(x)


class Retains(Classifier):
    def logits(self, x):
        self.kept = self.net(x)
        self.kept.retain_grad()
        return self.kept


class HookedLayer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.register_full_backward_hook(lambda *_: None)


class HookedBefore(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.register_full_backward_pre_hook(lambda *_: None)


IGNORED = {
    Reverses: "Reverse", ReversesByAnotherName: "Reverse", Clips: "Clipped", HooksOutputs: "register_hook",
    HooksWhereItCan: "register_hook", HooksWeightsInTheStep: "register_hook", Retains: "retain_grad",
    HookedLayer: "net", HookedBefore: "net",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@every_rule
@pytest.mark.parametrize("kind", IGNORED)
def test_what_a_backward_pass_would_run_is_refused_with_the_cure(kind, rule):
    module = kind()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=rf"{IGNORED[kind]}(.|\n)*Backprop\(\)"):
        fitted(module, vector_data(), WITHOUT_BACKWARD[rule]())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.Tensor.register_hook.__module__ == "torch._tensor"  # the watch has ended
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)
    fitted(module, vector_data(), bpf.Backprop())


class Squares(Classifier):
    def logits(self, x):
        return Square.apply(self.net(x))


class Rounds(Classifier):
    def logits(self, x):
        return Rounded.apply(self.net(x))


@pytest.mark.parametrize("rule", ["zeroth_order", "evolution"])
@pytest.mark.parametrize("kind", [Squares, Rounds])
def test_an_honest_backward_pass_and_a_surrogate_are_let_through(kind, rule):
    module = kind()
    before = module.net.weight.detach().clone()
    rules = {"zeroth_order": bpf.ZerothOrder(8, sigma=0.1), "evolution": bpf.EvolutionStrategy(population_size=8)}
    fitted(module, vector_data(), rules[rule])
    assert not torch.equal(before, module.net.weight)


@every_rule
def test_hooks_on_parameters_get_the_estimate(rule):
    torch.manual_seed(0)
    module = Classifier()
    half = module.net.weight[:, :3].detach().clone()
    module.net.weight.register_hook(lambda grad: torch.cat([torch.zeros(3, 3), grad[:, 3:]], 1))
    other = module.net.weight[:, 3:].detach().clone()
    fitted(module, vector_data(), WITHOUT_BACKWARD[rule]())
    assert torch.equal(module.net.weight[:, :3], half)
    assert not torch.equal(module.net.weight[:, 3:], other)


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


class AllDirections(pl.Callback):
    """Compares an orthogonal estimate along as many directions as coordinates with the gradient."""

    def setup(self, trainer, pl_module, stage) -> None:
        (rule,) = [callback for callback in trainer.callbacks if isinstance(callback, bpf.TrainingRule)]
        rule.observers.append(self)

    def due(self, trainer) -> bool:
        return True

    def observe(self, trainer, module, step, estimate) -> None:
        found = estimate.resolved()
        with torch.enable_grad():
            params = {slot.name: slot.parameter for slot in step.trained}
            grads = torch.autograd.grad(step.loss(recorded=False), list(params.values()))
        for (name, _), grad in zip(params.items(), grads, strict=True):
            # Equal maths in float64, through the inverse of a Gram matrix with a condition number of about 1e3.
            torch.testing.assert_close(found[name].to(grad.dtype), grad, rtol=1e-5, atol=1e-8, msg=name)


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


@pytest.mark.parametrize("rule", [*WITHOUT_BACKWARD, "backprop"])
@pytest.mark.parametrize("net", LAZY)
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


# --- precision within the step ---------------------------------------------------------------------------------------


class Casts(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().training_step(batch, batch_idx)


class CastsByDecorator(Classifier):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


class CastsFunctions(Classifier):
    """No layer is called."""

    def logits(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, self.net.weight, self.net.bias).float()


class CastsAHead(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3).bfloat16()))

    def logits(self, x):
        return self.net[1](self.net[0](x).bfloat16()).float()


HALF = [Casts, CastsByDecorator, CastsFunctions, CastsAHead]


@pytest.mark.parametrize("kind", HALF)
def test_sigma_follows_what_the_step_computes(kind):
    rule = bpf.ZerothOrder(2)
    fitted(kind(), vector_data(), rule)
    assert rule._sigma_used == 1e-2


@pytest.mark.parametrize("rule", [lambda: bpf.ZerothOrder(sigma=1e-3),
                                  lambda: bpf.EvolutionStrategy(bpf.OpenAIES(sigma=1e-3), 8)])  # fmt: skip
@pytest.mark.parametrize("kind", HALF)
def test_a_sigma_that_the_step_swallows_is_refused(kind, rule):
    module = kind()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"lost in the rounding of torch\.bfloat16"):
        fitted(module, vector_data(), rule())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class StoredInHalf(Classifier):
    def logits(self, x):
        return self.net(x.half().float())


class SwitchedOff(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Classifier, StoredInHalf, SwitchedOff])
def test_sigma_stays_where_nothing_is_computed_in_half_precision(kind):
    rule = bpf.ZerothOrder(2)
    fitted(kind(), vector_data(), rule)
    assert rule._sigma_used == 1e-3


# --- an optimizer that holds a part of the parameters ----------------------------------------------------------------


class HeadOnly(Classifier):
    def __init__(self) -> None:
        super().__init__(smooth())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


@pytest.mark.parametrize("rule", ["forward", "loop", "central"])
def test_only_what_an_optimizer_holds_is_estimated(rule):
    """Along all 18 directions of the head, the estimate is the head's gradient: no direction leaves it."""
    rules = {
        "forward": lambda: bpf.ForwardGradient(18, orthogonal=True),
        "loop": lambda: bpf.ForwardGradient(18, orthogonal=True, chunk_size=1),
        "central": lambda: bpf.ZerothOrder(18, sigma=1e-4, orthogonal=True),
    }
    module = HeadOnly()
    fitted(module, vector_data(), rules[rule](), AllDirections(), limit_train_batches=1, precision="64-true")
    assert module.net[0].weight.grad is None


@pytest.mark.parametrize("algorithm", ["openai_es", "snes"])
def test_a_search_has_the_coordinates_that_an_optimizer_holds(algorithm):
    rule = bpf.EvolutionStrategy(algorithm, population_size=8)
    fitted(HeadOnly(), vector_data(), rule)
    assert rule._coordinates.dim == 18


class Grows(HeadOnly):
    """Hands the optimizer further parameters at the second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.optimizers(use_pl_optimizer=False).add_param_group({"params": self.net[0].parameters()})


@every_rule
def test_parameters_that_an_optimizer_gets_later_train_from_then_on(rule):
    module = Grows()
    before = module.net[0].weight.detach().clone()
    fitted(module, vector_data(), WITHOUT_BACKWARD[rule]())
    assert torch.equal(module.net[0].weight, before)
    fitted(module, vector_data(), WITHOUT_BACKWARD[rule](), max_epochs=2)
    assert not torch.equal(module.net[0].weight, before)


# --- nothing to learn from -------------------------------------------------------------------------------------------


class Errors(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 1 - (self.net(batch[0]).argmax(1) == batch[1]).float().mean()


class Constant(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0 + 1


class Dead(Classifier):
    def logits(self, x):
        return F.relu(self.net(x) - 1e6)


FLAT = {
    "zeroth_order": (lambda: bpf.ZerothOrder(4), "larger sigma"),
    "one_sided": (lambda: bpf.ZerothOrder(4, scheme="forward"), "larger sigma"),
    "forward_gradient": (lambda: bpf.ForwardGradient(4), "EvolutionStrategy"),
    "loop": (lambda: bpf.ForwardGradient(1), "EvolutionStrategy"),
    "evolution": (lambda: bpf.EvolutionStrategy(population_size=8), "larger sigma"),
}


@pytest.mark.parametrize("rule", FLAT)
@pytest.mark.parametrize("kind", [Constant, Dead])
def test_a_flat_objective_is_said_once_with_the_cure(kind, rule):
    make, cure = FLAT[rule]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fitted(kind(), vector_data(), make(), max_epochs=2)
    said = [str(w.message) for w in heard if type(make()).__name__ in str(w.message)]
    assert len(said) == 1
    assert cure in said[0]


def test_an_objective_of_few_values_is_said_to_be_flat():
    with pytest.warns(UserWarning, match=r"ZerothOrder: the loss is flat along all 4 directions in batch 0"):
        fitted(Errors(), vector_data(), bpf.ZerothOrder(4))


@pytest.mark.parametrize("rule", ["zeroth_order", "forward_gradient", "loop"])
def test_nothing_is_said_of_an_ordinary_objective(rule, recwarn):
    fitted(Classifier(), vector_data(), FLAT[rule][0]())
    assert not [w for w in recwarn if "flat" in str(w.message)]
