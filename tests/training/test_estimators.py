"""Forward gradients and zeroth order estimate the gradient: along it, with the spread of theory, on the same noise."""

from functools import partial

import numpy as np
import pytest
import torch
from conformance import run
from problems import Problem, Tied, fitted, loader
from torch import nn

from lightning_bpfree import ForwardGradient, GradientAlignment, ZerothOrder
from lightning_bpfree.functional import directional_derivative, forward_gradient, zeroth_order_gradient


def quadratic(d=12):
    torch.manual_seed(0)
    a = torch.randn(d, d, dtype=torch.float64)
    a = a @ a.T / d
    at = {"w": torch.randn(d, dtype=torch.float64)}
    return (lambda p: 0.5 * p["w"] @ a @ p["w"]), at, a @ at["w"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimate",
    [
        forward_gradient,
        partial(zeroth_order_gradient, sigma=0.1),  # central differences of a quadratic are exact, whatever sigma
        partial(zeroth_order_gradient, sigma=1e-4, scheme="forward"),
    ],
)
@pytest.mark.parametrize("directions", ["gaussian", "rademacher"])
def test_unbiased_along_the_gradient(estimate, directions):
    loss_fn, at, gradient = quadratic()
    along = []
    for seed in range(2000):
        _, grads = estimate(loss_fn, at, directions=directions, seed=seed)
        along.append(float(grads["w"] @ gradient / gradient.square().sum()))
    along = torch.tensor(along)
    # One direction: <e, g> / |g|^2 is the square of a unit normal (sd sqrt 2) or less (signs).
    assert abs(float(along.mean()) - 1) < 4 * 2**0.5 / 2000**0.5
    if directions == "gaussian":
        assert float(along.std()) == pytest.approx(2**0.5, rel=0.15)


def test_central_differences_err_by_sigma_squared_and_forward_ones_by_sigma():
    at, v = {"w": torch.tensor([0.7], dtype=torch.float64)}, {"w": torch.ones(1, dtype=torch.float64)}
    loss_fn = lambda p: (p["w"] ** 4 / 4 + p["w"] ** 3 / 3).sum()  # noqa: E731
    _, exact = directional_derivative(loss_fn, at, v)
    for sigma in (0.1, 0.01):
        ahead = {"w": at["w"] + sigma}
        back = {"w": at["w"] - sigma}
        central = (loss_fn(ahead) - loss_fn(back)) / (2 * sigma) - exact
        # third derivative / 6 * sigma^2, exactly, for a polynomial of degree four
        assert float(central) == pytest.approx((6 * 0.7 + 2) / 6 * sigma**2, rel=1e-6)


def gradients_of(rule, **net):
    torch.manual_seed(0)
    module = Problem(Tied(**net).double(), lr=0.0).double()
    data = loader()
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    fitted(module, data, rule, precision="64-true")
    return module.gradients


@pytest.mark.parametrize("batch_norm", [True, False])
def test_zeroth_order_with_a_tiny_sigma_is_forward_mode_on_the_same_dropout_noise(batch_norm):
    how = {"dropout": 0.5, "batch_norm": batch_norm}
    forward = gradients_of(ForwardGradient(3, seed=4, chunk_size=1), **how)
    zeroth = gradients_of(ZerothOrder(3, seed=4, sigma=1e-5), **how)
    assert len(forward) == len(zeroth) == 4
    for a, b in zip(forward, zeroth, strict=True):
        for name in a:
            # float64: rounding 1e-16 / 1e-5 and curvature sigma^2 = 1e-10, over slopes of order one
            torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-7)


def test_vectorised_and_looped_forward_gradients_agree_batch_norm_included():
    one = gradients_of(ForwardGradient(5, seed=4, chunk_size=1), dropout=0.0)
    many = gradients_of(ForwardGradient(5, seed=4, chunk_size=2), dropout=0.0)
    for a, b in zip(one, many, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)  # equal math in float64


@pytest.mark.parametrize("make", [partial(ForwardGradient, chunk_size=1), partial(ZerothOrder, sigma=1e-5)])
def test_k_orthogonal_directions_for_d_parameters_give_the_gradient_itself(make):
    torch.manual_seed(0)
    module = Problem(nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 3)).double(), lr=0.0).double()
    d = sum(p.numel() for p in module.parameters())
    data = loader(rows=16)
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    alignment = GradientAlignment(every_n_steps=1)
    trainer = fitted(module, data, make(d, orthogonal=True, seed=1), alignment, precision="64-true")
    assert alignment.mean_cosine == pytest.approx(1.0, abs=1e-6)  # a d x d solve; differences add 1e-10 / sigma
    assert float(trainer.callback_metrics["bpfree/norm_ratio"]) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num", [10, 100])
def test_mean_cosine_is_that_of_theory(num):
    """cos = sqrt(K / (K + d + 1)) within 5 % for K >= 10."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    module = Problem(net, lr=0.0)
    d = sum(p.numel() for p in module.parameters())
    alignment = GradientAlignment(every_n_steps=1)
    rows = 4096 if num == 10 else 1024
    fitted(module, loader(rows=rows, batch_size=8), ForwardGradient(num, chunk_size=num), alignment)
    # The cosine of one step has a spread of about 0.7 / sqrt(d + K); 512 (128) steps leave 4 standard errors < 5 %.
    assert alignment.mean_cosine == pytest.approx((num / (num + d + 1)) ** 0.5, rel=0.05)


def test_directions_are_new_for_every_batch_and_equal_for_equal_seeds():
    a = gradients_of(ForwardGradient(seed=1), dropout=0.0)
    b = gradients_of(ForwardGradient(seed=1), dropout=0.0)
    c = gradients_of(ForwardGradient(seed=2), dropout=0.0)
    one, two = (torch.cat([g.flatten() for g in grads.values()]) for grads in a[:2])
    # Random directions in d dimensions: the cosine has a spread of 1 / sqrt(d), below 0.5 at five standard deviations.
    assert abs(float(nn.functional.cosine_similarity(one, two, dim=0))) < 0.5
    assert all(torch.equal(a[i][n], b[i][n]) for i in range(4) for n in a[0])
    assert not torch.equal(a[0]["net.head.weight"], c[0]["net.head.weight"])


def test_several_closure_calls_see_the_same_directions():
    class Lbfgs(Problem):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.0, max_iter=3, tolerance_change=-1.0)

    module = Lbfgs(Tied(batch_norm=False))
    seen = []

    class Spy(ForwardGradient):
        def estimate(self, step):
            seen.append(step.seed)
            return super().estimate(step)

    fitted(module, loader(rows=32), Spy())
    assert len(seen) > len(set(seen)) == 2  # two batches


def test_what_a_rule_costs_is_counted():
    for rule, cost in [
        (ForwardGradient(), 3),
        (ForwardGradient(4, chunk_size=1), 12),
        (ForwardGradient(4, chunk_size=4), 1 + 9),
        (ZerothOrder(3), 7),
        (ZerothOrder(3, scheme="forward"), 4),
    ]:
        run(lambda rule=rule: rule)
        assert rule.record.forward_evals == 4 * cost


def test_the_chosen_chunk():
    def chosen(net, **how):
        rule = ForwardGradient(4, **how)
        run(lambda: rule, module=Problem(net))
        return rule

    dense = lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    conv = lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))  # noqa: E731
    assert chosen(dense())._chunk_used == 4
    assert chosen(conv())._chunk_used == 1
    timed = chosen(dense(), chunk_size="fastest")
    assert timed._chunk_used in (1, 4)
    again = ForwardGradient(4, chunk_size="fastest")
    again.load_state_dict(timed.state_dict())
    assert again._chunk_used == timed._chunk_used  # so that a resumed run rounds as the first one did


def test_where_vectorising_fails_the_loop_takes_over_and_says_so(caplog):
    class Looks(Problem):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            assert np.isfinite(loss.detach().numpy())  # NumPy cannot look at a tensor under vmap
            return loss

    rule = ForwardGradient(4)
    with caplog.at_level("INFO"):
        fitted(Looks(), loader(), rule)
    assert rule._chunk_used == 1
    assert "one by one, since vectorizing fails" in caplog.text
    with pytest.raises(Exception, match="chunk_size=1 or 'auto'"):
        fitted(Looks(), loader(), ForwardGradient(4, chunk_size=4))


def test_where_vectorising_draws_another_dropout_mask_the_loop_takes_over(caplog):
    class Transposed(nn.Module):
        """Dropout behind a transpose: its mask follows the layout of memory, which differs under vmap."""

        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.5, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.encoder(x.unsqueeze(1).expand(-1, 4, -1)).mean(1))

    rule = ForwardGradient(4)
    with caplog.at_level("INFO"):
        fitted(Problem(Transposed()), loader(), rule)
    assert (rule._chunk_used == 1) == ("another dropout mask" in caplog.text)
