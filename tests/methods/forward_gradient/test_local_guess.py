"""Forward gradients along guesses: the projection, where backprop ends, and what becomes of the heads."""

import types
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conformance import resume_is_exact
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, Tied, fitted, loader
from torch import nn

from lightning_bpfree import Backprop, ForwardGradient, GradientAlignment, LocalLoss, ScalarSyncStrategy
from lightning_bpfree.core.blocks import cut
from lightning_bpfree.demos.nets import MLP, SmallCNN, SmallTransformer
from lightning_bpfree.functional import cosine
from lightning_bpfree.methods.forward_gradient import projection as local_guess
from lightning_bpfree.methods.forward_gradient.projection import unit
from lightning_bpfree.training.checks import check_fit

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


def given(monkeypatch, guess):
    """Let `guess(sources)` stand for the gradients of the local losses."""

    def instead(head, output, labels, sources, trained):
        return torch.zeros(len(output)), [guess(source) for source in sources], []

    monkeypatch.setattr(local_guess, "local_gradients", instead)


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


# --- the projection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("scope", ["network", "block", "tensor"])
def test_the_true_gradient_as_a_guess_gives_the_gradient(scope, factor, monkeypatch):
    truth = step(Backprop())
    by_shape = {tuple(grad.shape): grad for grad in truth.values()}
    given(monkeypatch, lambda source: factor * by_shape[tuple(source.shape)])
    close(step(ForwardGradient(guess=LocalLoss(), scope=scope)), truth, rtol=1e-10, atol=1e-14)  # float64 sums


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("kind", [Watches, Coupled])
def test_the_true_gradient_at_outputs_gives_the_gradient_also_for_a_loss_that_couples_samples(
    kind, factor, monkeypatch
):
    truth = step(Backprop(), kind=kind)
    at = {grad.shape[1]: grad for grad in kind(chain()).at_blocks(data_in(torch.float64)).values()}
    given(monkeypatch, lambda source: factor * at[source.shape[1]])
    rule = ForwardGradient(guess=LocalLoss(), space="activations")
    close(step(rule, kind=kind), truth, rtol=1e-10, atol=1e-14)  # float64 sums


def test_a_guess_at_right_angles_and_a_guess_of_zero_give_zero_and_leave_the_last_part_exact(monkeypatch):
    truth = step(Backprop())
    shapes = {tuple(grad.shape): grad for grad in truth.values()}

    def orthogonal(source):
        grad = shapes[tuple(source.shape)]
        drawn = torch.randn_like(grad)
        return drawn - (drawn * grad).sum() / grad.square().sum() * grad

    for guess in (orthogonal, torch.zeros_like, lambda _: None):
        given(monkeypatch, guess)
        made = step(ForwardGradient(guess=LocalLoss(), scope="tensor"))
        assert float(flat(part(made)).abs().max()) < 1e-15
        close(part(made, {"net.4.weight", "net.4.bias"}), part(truth, {"net.4.weight", "net.4.bias"}), rtol=0, atol=0)
    given(monkeypatch, torch.zeros_like)
    made = step(ForwardGradient(guess=LocalLoss(), space="activations"))
    assert float(flat(part(made)).abs().max()) == 0.0


@pytest.mark.parametrize("scope", ["network", "block"])
@pytest.mark.parametrize("space", SPACES)
def test_sign_size_and_cosine(space, scope):
    """u is a direction of descent, not longer than g, and as near to g as the line of the guess is."""
    truth = part(step(Backprop()))
    made = part(step(ForwardGradient(guess=FROZEN(), space=space, scope=scope, seed=1)))
    assert float(flat(made) @ flat(truth)) > 0
    assert float(flat(made).norm()) <= float(flat(truth).norm())
    if space == "weights" and scope == "network":
        guess = part(step(ForwardGradient(guess=FROZEN(), target="local", seed=1)))
        assert float(cosine(made, truth)) == pytest.approx(abs(float(cosine(guess, truth))), rel=1e-9)


def test_projecting_block_by_block_is_never_further_from_the_gradient():
    """By Cauchy and Schwarz; why it is the default."""
    truth = part(step(Backprop()))
    made = [part(step(ForwardGradient(guess=FROZEN(), scope=s, seed=1))) for s in ("network", "block", "tensor")]
    near = [float(cosine(u, truth)) for u in made]
    assert near[0] < near[1] < near[2]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("factor", [1e-9, -7.0, 1e9])
def test_the_size_of_the_guess_does_not_matter(space, factor, monkeypatch):
    rule = partial(ForwardGradient, guess=FROZEN(), space=space, seed=1)
    plain = step(rule(), dtype=torch.float32)
    own = local_guess.local_gradients

    def scaled(*args):
        losses, found, heads = own(*args)
        return losses, [factor * q for q in found], heads

    monkeypatch.setattr(local_guess, "local_gradients", scaled)
    close(step(rule(), dtype=torch.float32), plain, rtol=1e-4, atol=1e-7)  # float32, over a range of 1e18


def test_projecting_twice_changes_nothing(monkeypatch):
    once = step(ForwardGradient(guess=FROZEN(), seed=1))
    shapes = {tuple(grad.shape): grad for grad in once.values()}
    given(monkeypatch, lambda source: shapes[tuple(source.shape)])
    close(step(ForwardGradient(guess=LocalLoss())), once, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_a_random_vector_divided_by_its_square_is_biased_by_one_over_d(monkeypatch):
    """What the published weight-space code does with random guesses; here they are not divided."""
    truth = part(step(Backprop()))
    generator = torch.Generator().manual_seed(0)
    given(monkeypatch, lambda s: torch.randn(s.shape, generator=generator, dtype=s.dtype))
    repeated = torch.utils.data.DataLoader(data_in(torch.float64).dataset, batch_sampler=[list(range(16))] * 200)
    found = steps(ForwardGradient(guess=LocalLoss(), scope="network"), data=repeated, log_every_n_steps=0)
    along = torch.stack([flat(part(u)) @ flat(truth) for u in found]) / flat(truth).square().sum()
    d = flat(truth).numel()
    # The square of a coordinate of a random unit vector: mean 1 / d, standard deviation below sqrt(2) / d.
    assert float(along.mean()) * d == pytest.approx(1, abs=4 * 2**0.5 / 200**0.5)


def test_unit():
    a, b = unit([torch.randn(4, 3), torch.randn(4, 2, 2)], each_sample=True)
    torch.testing.assert_close(a.square().sum(1) + b.square().sum((1, 2)), torch.ones(4))
    assert torch.equal(unit([torch.zeros(3)])[0], torch.zeros(3))
    assert float(unit([torch.full((3,), 1e-15)])[0].norm()) == pytest.approx(1)
    assert not unit([])


# --- targets and spaces -------------------------------------------------------------------------------------------


def head_of(rule, role="guess", block=0):
    """Weight and bias of a linear head."""
    return list(rule.rule_state()["guided"][role].values())[block]["module"]


@pytest.mark.parametrize("update", ["train", "freeze"])
def test_guess_and_target_local_is_local_learning(update):
    rules = [ForwardGradient(guess=LocalLoss(update=update), target="local", space=s, seed=1) for s in SPACES]
    one, two = (step(rule) for rule in rules)
    assert all(torch.equal(one[name], two[name]) for name in one)
    if update == "train":
        return  # its heads have moved since
    net, (x, y) = chain(), next(iter(data_in(torch.float64)))
    for block, (start, names) in enumerate([(0, ("net.0.weight", "net.0.bias")), (2, ("net.2.weight", "net.2.bias"))]):
        z = net[start : start + 2](net[:start](x).detach())
        head = head_of(rules[0], block=block)
        F.cross_entropy(F.linear(z, head["1.weight"], head["1.bias"]), y).backward()
        close({n: one[n] for n in names}, dict(zip(names, (net[start].weight.grad, net[start].bias.grad), strict=True)))


@pytest.mark.parametrize("scope", ["network", "block", "tensor", None])
def test_projecting_a_local_gradient_on_itself_gives_it_back(scope):
    """Two equal local losses, of which one is the guess: the identity, by way of the projection."""
    local = step(ForwardGradient(guess=LocalLoss(), target="local", seed=1))
    for space in SPACES if scope is None else ["weights"]:
        rule = ForwardGradient(guess=LocalLoss(), target=LocalLoss(), space=space, scope=scope, seed=1)
        close(step(rule), local, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", [{}, {"guess": LocalLoss()}, {"target": "local"}, {"space": "activations"}])
def test_without_a_block_all_is_exact(how):
    nothing = lambda network: []  # noqa: E731
    how = {"guess": LocalLoss(blocks=nothing)} if "guess" in how else {**how, "blocks": nothing}
    one, two = step(Backprop()), step(ForwardGradient(**how))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", [Watches, Coupled])
def test_slopes_of_samples_are_inner_products_with_backprops_gradient(kind, dtype, rtol, monkeypatch):
    truth = kind(chain(dtype)).at_blocks(data_in(dtype))
    seen, own = [], local_guess.sample_slopes

    def spied(parts, output_gradient, injected, direction):
        directions = {}

        def kept(j, z):
            directions[j] = direction(j, z).clone()
            return directions[j]

        slopes = own(parts, output_gradient, injected, kept)
        seen.append((directions, slopes))
        return slopes

    monkeypatch.setattr(local_guess, "sample_slopes", spied)
    step(ForwardGradient(guess=FROZEN(), space="activations", seed=1), kind=kind, dtype=dtype)
    step(ForwardGradient(2, space="activations", seed=1), kind=kind, dtype=dtype)
    assert [list(directions) for directions, _ in seen] == [[0], [1]] * 3
    for directions, found in seen:
        ((j, v),) = directions.items()
        expected = (truth[j] * v).sum(1)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["network", "block"])
def test_random_activations_are_unbiased_along_the_gradient_with_the_spread_of_theory(scope):
    truth, at = part(step(Backprop())), Watches(chain()).at_blocks(data_in(torch.float64))
    net, (x, _) = chain(), next(iter(data_in(torch.float64)))
    moved = {}  # how the outputs of a block move along the gradient of its parameters
    for j, start in enumerate((0, 2)):
        along = {f"{start}.{kind}": truth[f"net.{start}.{kind}"] for kind in ("weight", "bias")}
        here = {name: dict(net[start : start + 2].named_parameters())[name].detach() for name in along}
        call = partial(torch.func.functional_call, net[start : start + 2])
        entering = net[:start](x).detach()
        moved[j] = torch.func.jvp(lambda p, call=call, x=entering: call(p, (x,)), (here,), (along,))[1]
    pairs = [(at[j].detach(), moved[j].detach()) for j in moved]
    if scope == "network":
        pairs = [tuple(torch.cat(both, 1) for both in zip(*pairs, strict=True))]
    # <u, g> = sum_n (z_n . v_n) (v_n . w_n) with w the movement: its mean is |g|^2, and for Gaussian v its variance
    # sum_n |z_n|^2 |w_n|^2 + (z_n . w_n)^2.
    variance = sum(float((z.square().sum(1) * w.square().sum(1) + (z * w).sum(1) ** 2).sum()) for z, w in pairs)
    assert sum(float((z * w).sum()) for z, w in pairs) == pytest.approx(float(flat(truth).square().sum()))
    repeated = torch.utils.data.DataLoader(data_in(torch.float64).dataset, batch_sampler=[list(range(16))] * 200)
    rule = ForwardGradient(space="activations", scope=scope, blocks=1, seed=3)
    found = [float(flat(part(u)) @ flat(truth)) for u in steps(rule, data=repeated, log_every_n_steps=0)]
    mean, square = float(flat(truth).square().sum()), torch.tensor(found).var()
    assert sum(found) / 200 == pytest.approx(mean, abs=4 * (variance / 200) ** 0.5)
    assert float(square) == pytest.approx(variance, rel=0.5)  # of 200 draws: 10 to 12 % at one standard error


@pytest.mark.parametrize("target", ["global", "local"])
def test_several_random_activations_count_as_their_mean(target, monkeypatch):
    own = local_guess.BlockProjection._random_at
    monkeypatch.setattr(local_guess.BlockProjection, "_random_at", lambda self, k, j, z: own(self, 0, j, z))
    one, three = (step(ForwardGradient(k, space="activations", target=target, seed=1)) for k in (1, 3))
    close(one, three, rtol=1e-10, atol=1e-14)  # three times the same direction


def test_random_activations_differ_between_blocks_ranks_and_directions(monkeypatch):
    drawn, own = [], local_guess.BlockProjection._random_at

    def kept(self, k, j, z):
        drawn.append(own(self, k, j, z))
        self.rank += 1
        drawn.append(own(self, k, j, z))
        self.rank -= 1
        return drawn[-2]

    monkeypatch.setattr(local_guess.BlockProjection, "_random_at", kept)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    steps(ForwardGradient(2, space="activations", target="local", seed=1), net=net)
    assert len(drawn) == len({tuple(v.flatten().tolist()) for v in drawn}) == 2 * 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["network", "block", "tensor"])
def test_random_weights_of_blocks_are_unbiased_along_the_gradient(scope):
    truth = part(step(Backprop()))
    num = 200
    made = part(step(ForwardGradient(num, blocks=1, scope=scope, seed=3)))
    along = float(flat(made) @ flat(truth) / flat(truth).square().sum())
    assert along == pytest.approx(1, abs=4 * 2**0.5 / num**0.5)  # one direction: at most sqrt 2, as for all at once


@pytest.mark.parametrize("space", SPACES)
def test_random_directions_with_a_local_target_are_unbiased_along_the_local_gradient(space):
    frozen = FROZEN()
    local = part(step(ForwardGradient(guess=frozen, target="local", seed=1)))
    num = 250
    rule = ForwardGradient(num, target=frozen, space=space, seed=1)
    along = float(flat(part(step(rule))) @ flat(local) / flat(local).square().sum())
    assert along == pytest.approx(1, abs=4 * 2**0.5 / num**0.5)  # one direction: at most sqrt 2


@pytest.mark.slow
def test_variance_in_activations_and_in_weights():
    """(#activations + 1) against (#weights + 1), per sample, for a linear layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3)).double()
    one = torch.utils.data.DataLoader(data_in(torch.float64).dataset, batch_sampler=[[0]] * 200)
    name = "net.0.weight"
    truth = step(Backprop(), net=net, data=one)[name]

    def variance(**how):
        rule = ForwardGradient(blocks=1, seed=2, **how)
        found = torch.stack([u[name] for u in steps(rule, net=net, data=one, log_every_n_steps=0)])
        return float((found - truth).square().sum((1, 2)).mean() / truth.square().sum())

    # A mean of 200 squares (u - g)^2 of about s^2 d with s normal, which spread by sqrt(2) times their size: 10 %.
    assert variance(space="activations") == pytest.approx(4 + 1, rel=0.4)
    assert variance(space="weights", scope="block") == pytest.approx(24 + 1, rel=0.4)


# --- heads --------------------------------------------------------------------------------------------------------


def test_heads_learn_and_are_no_part_of_the_module():
    """Learning alone says little; their state is what is looked at."""
    rule = ForwardGradient(guess=LocalLoss(lr=0.05), seed=1)
    torch.manual_seed(0)
    module = Problem(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), lr=0.05)
    names = set(module.state_dict())
    logged = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            logged.append(float(trainer.callback_metrics["bpfree/forward_gradient/local_loss/guess/0..1"]))

    alignment = GradientAlignment(every_n_steps=1)
    fitted(module, loader(rows=128), rule, alignment, Reads(), max_epochs=6)
    assert set(module.state_dict()) == names
    assert sum(logged[-8:]) < 0.8 * sum(logged[:8])
    assert alignment.mean_cosine > 0.5
    (saved,) = rule.rule_state()["guided"]["guess"].values()
    assert saved["module"]["1.weight"].shape == (3, 16)
    assert saved["optimizer"]["state"]


@pytest.mark.parametrize(
    "how",
    [
        {"guess": LocalLoss("mlp", blocks=[["inner", "norm", "frozen", "again", "drop"]], network="net")},
        {"space": "activations", "target": "local", "blocks": [["inner", "norm", "frozen", "again"]], "network": "net"},
        {"guess": LocalLoss(blocks=[["inner", "norm"]], network="net", update="reset"), "scope": "network"},
    ],
    ids=["trained", "target", "reset"],
)
def test_resume_is_bit_for_bit_with_heads(how):
    if how.get("guess") is not None and how["guess"].update == "reset":
        how = {**how, "params": ["net.inner.*", "net.norm.*", "net.head.*"]}
        with pytest.raises(MisconfigurationException, match=r"net\.inner\.weight is tied"):
            resume_is_exact(partial(ForwardGradient, **how))
        how["params"] = ["net.norm.*", "net.head.*"]
    resume_is_exact(partial(ForwardGradient, **how))


def test_head_gradients_of_micro_batches_count_as_their_mean():
    def heads(**settings):
        rule = ForwardGradient(guess=LocalLoss(optimizer="sgd", lr=0.1), seed=1)
        steps(rule, **settings)
        return head_of(rule)

    whole = heads(data=data_in(torch.float64, rows=32, batch_size=32))
    parts = heads(data=data_in(torch.float64, rows=32, batch_size=16), accumulate_grad_batches=2)
    close(whole, parts, rtol=1e-10, atol=1e-12)


def test_a_block_learns_from_its_own_loss_alone():
    plain = step(ForwardGradient(guess=FROZEN(), target="local", seed=1))
    net = chain()
    with torch.no_grad():
        net[2].weight.mul_(-50).add_(1)
        net[4].bias.add_(3)
    wild = step(ForwardGradient(guess=FROZEN(), target="local", seed=1), net=net)
    for name, grad in plain.items():
        assert torch.equal(grad, wild[name]) == name.startswith("net.0.")


class Probe(nn.Module):
    """Keeps whether what comes in has a graph."""

    def __init__(self):
        super().__init__()
        self.graphs = []

    def forward(self, x):
        self.graphs.append(x.requires_grad)
        return x


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("target", ["global", "local"])
def test_graphs_end_at_blocks(space, target):
    """Else all blocks would be held at once, as in backprop."""
    net = nn.Sequential(nn.Linear(6, 7), Probe(), nn.Linear(7, 5), Probe(), nn.Linear(5, 3)).double()
    step(ForwardGradient(guess=LocalLoss(blocks=[["0"], ["1", "2"]]), space=space, target=target), net=net)
    for probe in (net[1], net[3]):
        assert probe.graphs
        assert not any(probe.graphs)


def test_reset_heads_are_new_for_every_batch_and_frozen_ones_stay(monkeypatch):
    same = torch.utils.data.DataLoader(data_in(torch.float64).dataset, batch_sampler=[list(range(16))] * 3)

    def found(update):
        rule = ForwardGradient(guess=LocalLoss(update=update), seed=1)
        return rule, [u["net.0.weight"] for u in steps(rule, data=same)]

    frozen, one = found("freeze")
    assert torch.equal(one[0], one[2])
    (saved, _) = frozen.rule_state()["guided"]["guess"].values()
    assert saved["optimizer"] is None
    reset, two = found("reset")
    assert not torch.equal(two[0], two[1])
    assert reset.rule_state()["guided"]["guess"] == {}
    assert all(torch.equal(a, b) for a, b in zip(two, found("reset")[1], strict=True))


def test_the_global_stream_does_not_move():
    torch.manual_seed(3)
    fitted(Problem(Tied(dropout=0.3)), loader(), Backprop())
    expected = torch.rand(2)
    for update in ("train", "reset"):
        torch.manual_seed(3)
        how = LocalLoss(blocks=[["inner", "norm", "frozen", "again", "drop"]], network="net", update=update)
        fitted(Problem(Tied(dropout=0.3)), loader(), ForwardGradient(guess=how))
        assert torch.equal(torch.rand(2), expected)


# --- networks -----------------------------------------------------------------------------------------------------

NETWORKS = {
    "mlp": (lambda: MLP(64, [16, 12], 3), 1),
    "cnn": (lambda: SmallCNN((1, 8, 8), [4, 8], 3, norm="group"), ["features.*"]),
    "transformer": (
        lambda: SmallTransformer((1, 8, 8), 3, dim=8, depth=2, heads=2, dropout=0.2),
        [["embed", "position", "encoder.layers.0"], "encoder.layers.1"],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "how",
    [
        {"guess": LocalLoss},
        {"guess": LocalLoss, "space": "activations"},
        {"guess": partial(LocalLoss, update="reset"), "target": LocalLoss, "scope": "tensor"},
        {"target": LocalLoss, "space": "activations"},
    ],
    ids=["weights", "activations", "two losses", "random local"],
)
def test_networks(name, how):
    net, blocks = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator)
    heads = {"cnn": "cnn", "mlp": "mlp"}.get(name, "linear")
    made = {k: v if isinstance(v, str) else v(heads, blocks=blocks) for k, v in how.items()}
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    module, alignment = Problem(net(), lr=0.01), GradientAlignment(every_n_steps=1)
    fitted(module, data, ForwardGradient(**made, seed=1), alignment)
    assert len(module.gradients) == 2
    assert all(bool(grad.isfinite().all()) for grad in module.gradients[1].values())
    assert all(float(grad.abs().sum()) > 0 for grad in module.gradients[1].values())
    assert alignment.mean_cosine > 0.1 or "guess" not in how  # one random direction is worth little


def test_costs():
    for how, cost in [
        ({"guess": LocalLoss(num_classes=3)}, 3 + 2 * 3),
        ({"guess": LocalLoss(num_classes=3), "scope": "network"}, 3 + 3),
        ({"guess": LocalLoss(num_classes=3), "scope": "tensor"}, 3 + 4 * 3),
        ({"guess": LocalLoss(num_classes=3), "space": "activations"}, 1 + 2 * 3 + 3),
        ({"space": "activations", "scope": "network", "num_directions": 4}, 1 + 4 * 3 + 3),
        ({"guess": LocalLoss(num_classes=3), "target": "local"}, 3),
        ({"target": LocalLoss(num_classes=3)}, 1 + 3),
        ({"target": LocalLoss(num_classes=3), "space": "activations"}, 3),
    ]:
        rule = ForwardGradient(**how)
        steps(rule)
        assert rule.record.forward_evals == cost, how
        if how.get("scope") == "network":
            assert f"({cost} forwards)" in rule.describe()["a step"]


# --- refusals -----------------------------------------------------------------------------------------------------


def test_ranks_cannot_exchange_a_few_numbers_for_it():
    assert ForwardGradient().exchanges_scalars
    rule, module = ForwardGradient(guess=LocalLoss()), Problem()
    assert not rule.exchanges_scalars
    assert not ForwardGradient(blocks=1).exchanges_scalars
    trainer = types.SimpleNamespace(strategy=ScalarSyncStrategy())
    with pytest.raises(MisconfigurationException, match=r"not a function of a few numbers.*strategy='ddp'"):
        check_fit(rule, ["ForwardGradient"], trainer, module)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"space": "outputs"}, "space='outputs': choose 'weights' or 'activations'"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"target": "above"}, "target='above': give 'global'"),
        ({"space": "activations", "scope": "tensor"}, "Use scope='block'"),
        ({"space": "activations", "scope": "network", "target": "local"}, "Use scope='block'"),
        ({"guess": LocalLoss(), "num_directions": 2}, "a guess is one direction"),
        ({"guess": LocalLoss(), "directions": "rademacher"}, "a guess is one direction"),
        ({"guess": LocalLoss(blocks=2), "target": LocalLoss()}, "blocks and network differ"),
        ({"guess": LocalLoss(), "blocks": 2}, "leave blocks and network of the rule out"),
        ({"blocks": 1, "orthogonal": True}, "orthogonal=True.*leave them out"),
        ({"space": "activations", "chunk_size": 4}, "chunk_size=4"),
    ],
)
def test_arguments_that_are_unknown_or_contradict_each_other(how, message):
    with pytest.raises(ValueError, match=message):
        ForwardGradient(**how)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_batch_norm_behind_a_block_is_refused_for_slopes_of_samples():
    def fit(**how):
        net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        if how.pop("evaluated", False):
            net[3].eval()
        fitted(Problem(net), loader(), ForwardGradient(**how))

    with pytest.raises(MisconfigurationException, match=r"3 \(BatchNorm1d\) lets samples see each other.*GroupNorm"):
        fit(space="activations")
    with pytest.raises(MisconfigurationException, match="space='weights'"):
        fit(guess=LocalLoss(), space="activations")
    fit(guess=LocalLoss())
    fit(space="activations", target="local")
    fit(space="activations", evaluated=True)


class Early(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(4))
        self.first, self.second, self.last = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x * self.scale)) + self.shift)))


@pytest.mark.parametrize("how", [{"guess": LocalLoss}, {"space": "activations"}, {"target": LocalLoss}])
def test_parameters_that_a_cut_would_leave_without_gradient_are_refused(how):
    def fit(blocks, **more):
        made = {k: v if isinstance(v, str) else v(blocks=blocks) for k, v in how.items()}
        if not {"guess", "target"} & made.keys():
            made["blocks"] = blocks
        fitted(Problem(Early()), loader(), ForwardGradient(**made, **more))

    with pytest.raises(MisconfigurationException, match=r"net\.scale runs before the end of block first.*Put it into"):
        fit(["first", "second"])
    with pytest.raises(MisconfigurationException, match=r"net\.shift runs before the end of block second"):
        fit(["first", "second"], params=["net.shift", "net.*.weight"])
    with pytest.raises(MisconfigurationException, match=r"net\.shift runs before the end of block first\.\.second"):
        fit([["first", "second"]], params=["net.shift", "net.*.weight"])
    fit(["first", "second"], params="net.*.weight")
    fit([["scale", "first", "shift", "second"]])


def test_labels_and_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="labels: values from 0 to 2 in a batch, but there are 2 classes"):
        step(ForwardGradient(guess=LocalLoss(num_classes=2)))
    picks = LocalLoss(labels=lambda batch: batch[1].float())
    with pytest.raises(ValueError, match="needed are whole numbers"):
        step(ForwardGradient(guess=picks))
    with pytest.raises(ValueError, match="'nothing' matches no module"):
        step(ForwardGradient(guess=LocalLoss(blocks=["nothing"])))
    with pytest.raises(ValueError, match="overlap"):
        step(ForwardGradient(guess=LocalLoss(blocks=[["0", "2"], ["2"]])))

    class Twice(Problem):
        def training_step(self, batch, index):
            return super().training_step(batch, index) + super().training_step(batch, index)

    with pytest.raises(RuntimeError, match="runs twice"):
        step(ForwardGradient(guess=LocalLoss(num_classes=3)), kind=Twice)

    class Peeks(Problem):
        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1]) + self.net[0](batch[0]).square().mean() * 0

    with pytest.raises(RuntimeError, match="runs twice"):
        step(ForwardGradient(guess=LocalLoss(blocks=["0"], num_classes=3)), kind=Peeks)


def test_a_loss_that_reads_the_blocks_past_the_networks_output_is_noticed():
    class Side(Problem):
        def training_step(self, batch, index):
            hidden = self.net[:2](batch[0])
            return F.cross_entropy(self.net[4](self.net[2:4](hidden)), batch[1]) + hidden.square().mean()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            self.hidden = torch.tanh(self.first(x))
            return self.last(self.hidden)

    class Penalty(Problem):
        def training_step(self, batch, index):
            return super().training_step(batch, index) + self.net.hidden.square().mean()

    blocks = {"blocks": ["first"]}
    with pytest.raises(MisconfigurationException, match=r"calls the network, Sequential, 0 times.*network="):
        step(ForwardGradient(space="activations"), kind=Side)
    with pytest.raises(MisconfigurationException, match="depends on its blocks by another way"):
        step(ForwardGradient(space="activations", **blocks), kind=Penalty, net=Net().double())
    step(ForwardGradient(guess=LocalLoss(blocks=["first"])), kind=Penalty, net=Net().double())
    step(ForwardGradient(space="activations", target="local", **blocks), kind=Penalty, net=Net().double())


@pytest.mark.parametrize("how", [{"guess": LocalLoss()}, {"guess": LocalLoss(), "target": "local"}])
@pytest.mark.parametrize("space", SPACES)
def test_a_loss_that_is_cut_from_the_network_is_noticed(how, space):
    class Item(Problem):
        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1]).item()

    with pytest.raises(MisconfigurationException, match=r"comes from the loss to the network's output.*ZerothOrder"):
        step(ForwardGradient(**how, space=space), kind=Item)


@pytest.mark.parametrize("guess", [None, FROZEN()])
def test_slopes_of_samples_survive_a_loss_that_has_nothing_left_to_learn(guess):
    """In float32 the slope of a loss near zero is rounding; it must not be taken for another way to the loss."""
    net = chain(torch.float32)
    net[4].bias.data.copy_(torch.tensor([30.0, 0.0, 0.0]))
    data = data_in(torch.float32)
    data.dataset.tensors = (data.dataset.tensors[0], torch.zeros(16, dtype=torch.int64))
    made = step(ForwardGradient(guess=guess, space="activations", seed=1), net=net, data=data, dtype=torch.float32)
    assert float(flat(made).abs().max()) < 1e-6


def test_nan_is_not_learned_from():
    data = data_in(torch.float64)
    data.dataset.tensors[0][3] = float("nan")
    for space in SPACES:
        rule = ForwardGradient(guess=LocalLoss(num_classes=3), space=space)
        with pytest.raises(RuntimeError, match="No parameter has moved"):
            steps(rule, data=data)
        rule = ForwardGradient(guess=LocalLoss(num_classes=3), space=space, on_nonfinite="skip", seed=1)
        with pytest.warns(UserWarning, match="is skipped"):
            assert steps(rule, data=data) == [{}]
        assert all(bool(t.isfinite().all()) for t in head_of(rule).values())


def test_the_cut_is_let_go_after_the_fit():
    rule = ForwardGradient(guess=LocalLoss())
    step(rule)
    assert rule._local_guesses._cut is None
    assert cut(chain(), 1).blocks[0].name == "0..1"
