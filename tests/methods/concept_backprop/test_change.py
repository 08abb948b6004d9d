"""Changed inputs: closed forms, independence of samples, and the rules of every parameterization."""

import math

import pytest
import torch
from torch import nn

from lightning_bpfree.methods.concept_backprop.callback import ConceptBackprop
from lightning_bpfree.methods.concept_backprop.change import ChangeSettings, change_concept, distances
from lightning_bpfree.methods.concept_backprop.concepts import Concept
from lightning_bpfree.methods.concept_backprop.discrete import CategoryChange, TokenChange
from lightning_bpfree.methods.concept_backprop.flips import flip_concept, single_changes, token_changes
from lightning_bpfree.methods.concept_backprop.parameterizations import AdditiveChange, GridChange, LatentChange
from lightning_bpfree.methods.concept_backprop.probe import LinearProbe


def probe_of(weight, bias=0.0, layer="0", **settings):
    weight = torch.as_tensor(weight, dtype=torch.float64)
    spread = float(weight.norm())
    return LinearProbe("c", layer, "binary", weight, torch.tensor(bias, dtype=torch.float64), spread=spread, **settings)


def linear(width=10, seed=0):
    """A network that is its input, a probe on it, and inputs far from the concept."""
    generator = torch.Generator().manual_seed(seed)
    weight = 3 * torch.randn(width, generator=generator, dtype=torch.float64)
    x = torch.randn(40, width, generator=generator, dtype=torch.float64)
    probe = probe_of(weight, -1.0)
    return nn.Sequential(nn.Identity()), x[probe.score(x) < 0.1], probe


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_the_smallest_change_of_a_linear_network_is_the_closed_form(distance):
    """The hyperplane ``logit = goal`` is ``gap / |w|_2`` away, or ``gap / max |w|`` in L1, along one coordinate."""
    net, x, probe = linear()
    settings = ChangeSettings(target=0.9, distance=distance, sparsify=distance == "l1")
    change = change_concept(net, x, probe, settings)
    gap = math.log(9) - probe.logit(x)
    least = gap / (probe.weight.norm() if distance == "l2" else probe.weight.abs().max())
    assert change.reached.all()
    assert (
        change.distance[distance] >= least * (1 - 1e-5)
    ).all()  # no change can be smaller; 1e-6 of slack in the logit
    assert float((change.distance[distance] / least).mean()) < 1.05  # a search of 200 steps
    if distance == "l2":
        cosines = torch.nn.functional.cosine_similarity(change.delta, probe.weight[None])
        assert cosines.min() > 0.99


def test_the_papers_loss_stops_where_its_slopes_cancel():
    """With ``softplus(-z) + lam / 2 |d|^2`` on a linear network: ``lam d = sigmoid(-z) w``."""
    net, x, probe = linear(4)
    settings = ChangeSettings(loss="bce", distance_weight=0.5, target=0.999, steps=800, lr=0.1)
    change = change_concept(net, x, probe, settings)
    assert not change.reached.any()  # the penalty keeps it from the target
    fixed = change.delta - torch.sigmoid(-probe.logit(change.changed))[:, None] * probe.weight / 0.5
    # 800 steps of Adam whose rate falls to 0, from 0.1
    assert float((fixed.norm(dim=1) / change.delta.norm(dim=1)).max()) < 0.01


def test_larger_penalties_give_smaller_changes_and_lower_scores():
    net, x, probe = linear()
    made = [change_concept(net, x, probe, ChangeSettings(loss="bce", distance_weight=w)) for w in (0.3, 3.0, 30.0)]
    sizes = [float(change.distance["l2"].mean()) for change in made]
    scores = [float(change.after.mean()) for change in made]
    assert sizes == sorted(sizes, reverse=True)
    assert scores == sorted(scores, reverse=True)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()


@pytest.mark.parametrize("loss", ["smallest", "bce"])
def test_samples_of_a_batch_do_not_meet(loss):
    """BatchNorm and dropout evaluate; sums, Adam and multipliers are each sample's own."""
    net, probe = mlp(), probe_of([3.0, -2.0, 1.0, 2.0], -1.0, "3")
    x = torch.randn(5, 5, dtype=torch.float64)
    settings = ChangeSettings(loss=loss, steps=30, sparsify=True)
    together = change_concept(net, x, probe, settings)
    alone = [change_concept(net, row[None], probe, settings).changed for row in x]
    torch.testing.assert_close(
        together.changed, torch.cat(alone), rtol=1e-10, atol=1e-12
    )  # matrix products of 5 and 1 rows


def test_what_shows_the_concept_already_is_left_alone():
    net, _, probe = linear()
    x = 2 * probe.weight[None] / probe.weight.norm()
    change = change_concept(net, x, probe)
    assert torch.equal(change.changed, x)


def test_lowering_is_raising_of_the_opposite():
    net, _, probe = linear()
    x = 2 * probe.weight[None] / probe.weight.norm()
    down = change_concept(net, x, probe, ChangeSettings("lower", 0.1))
    opposite = probe_of(-probe.weight, 1.0)
    up = change_concept(net, x, opposite, ChangeSettings("raise", 0.9))
    torch.testing.assert_close(
        down.changed, up.changed, rtol=1e-6, atol=1e-6
    )  # log(9) and -log(1/9) differ in the last bits
    assert down.reached.all()


def test_the_range_and_the_mask_hold():
    net, x, probe = linear()
    x = x.sigmoid()
    mask = torch.zeros(10)
    mask[:4] = 1
    change = change_concept(net, x, probe, parameterization=AdditiveChange(0.0, 1.0, mask))
    assert change.changed.min() >= 0
    assert change.changed.max() <= 1
    assert not change.delta[:, 4:].any()


def test_an_early_end_is_cheaper_and_reaches_too():
    net, x, probe = linear()
    early = change_concept(net, x, probe, ChangeSettings(stop_when_reached=True, lr=0.1))
    assert early.reached.all()
    assert early.steps < 200


def test_a_continuous_concept_reaches_its_value():
    net, x, _ = linear()
    weight = torch.ones(10, dtype=torch.float64)
    probe = LinearProbe("sum", "0", "continuous", weight, torch.tensor(0.0), spread=3.0, quantiles=(-4.0, 4.0))
    change = change_concept(net, x[probe.score(x) < 3], probe)
    torch.testing.assert_close(change.after, torch.full_like(change.after, 4.0), rtol=0.02, atol=0)  # 2^-8 of the way
    assert change.reached.all()


def test_latent_changes_stay_in_the_span_of_the_decoder():
    class Plane(nn.Module):
        def __init__(self):
            super().__init__()
            self.basis = nn.Parameter(torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64))[0])

        def encode(self, x):
            return x @ self.basis

        def decode(self, z):
            return z @ self.basis.T

    net, x, probe = linear()
    plane = Plane()
    change = change_concept(net, x, probe, parameterization=LatentChange(plane))
    rest = change.changed - plane.decode(plane.encode(change.changed))
    assert rest.abs().max() < 1e-10  # a projection, in float64
    assert change.reached.all()
    assert plane.basis.grad is None
    assert plane.basis.requires_grad
    assert torch.equal(change.reference, plane.decode(plane.encode(x)))


def test_a_grid_makes_smooth_changes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten())
    probe = probe_of(torch.randn(169), -3.0)
    x = torch.rand(3, 1, 13, 13, dtype=torch.float64)
    change = change_concept(net, x, probe, parameterization=GridChange(3))
    coarse = nn.functional.interpolate(change.delta, (3, 3), mode="bilinear", align_corners=True)  # corners of the grid
    again = nn.functional.interpolate(coarse, (13, 13), mode="bilinear", align_corners=True)
    torch.testing.assert_close(change.delta, again, rtol=1e-10, atol=1e-10)


def test_distances_are_each_samples_own():
    found = distances(torch.tensor([[3.0, -4.0], [0.0, 1.0]]), torch.zeros(2, 2))
    assert {name: values.tolist() for name, values in found.items()} == {
        "l1": [7.0, 1.0], "l2": [5.0, 1.0], "linf": [4.0, 1.0], "l0": [2.0, 1.0],
    }  # fmt: skip
    tokens = distances(torch.tensor([[1, 2, 3], [1, 5, 6]]), torch.tensor([[1, 2, 3], [1, 2, 3]]))
    assert tokens["l0"].tolist() == [0.0, 2.0]


# --- boards and tokens ---


def boards(count=40, seed=0):
    """One-hot boards of 2 x 2 squares with 3 categories, and a probe on the squares."""
    generator = torch.Generator().manual_seed(seed)
    found = nn.functional.one_hot(torch.randint(3, (count, 2, 2), generator=generator), 3).movedim(3, 1).double()
    return found, probe_of(3 * torch.randn(12, generator=generator), 1.0), nn.Sequential(nn.Flatten())


def fewest(board, probe, net, goal):
    """The least number of squares to change, by trying all 81 boards; None if none will do."""
    every = torch.cartesian_prod(*[torch.arange(3)] * 4).view(-1, 2, 2)
    every = nn.functional.one_hot(every, 3).movedim(3, 1).double()
    good = probe.score(net(every)) >= goal
    return None if not good.any() else int(((every[good] - board).abs().flatten(1).sum(1) / 2).min())


def test_greedy_flips_are_the_brute_force_optimum_of_an_additive_score():
    found, probe, net = boards()
    change = flip_concept(net, found, probe, single_changes, ChangeSettings(target=0.9))
    assert change.reached.any()
    for i, board in enumerate(found):
        least = fewest(board, probe, net, 0.9)
        assert bool(change.reached[i]) == (least is not None)
        if least is not None:
            assert int(change.distance["l0"][i]) == 2 * least  # a square that changes moves two planes


def test_straight_through_choices_are_near_the_brute_force_optimum():
    found, probe, net = boards()
    settings = ChangeSettings(target=0.9, distance_weight=0.0, sparsity=0.3, lr=0.1)
    change = change_concept(net, found, probe, settings, parameterization=CategoryChange())
    assert ((change.changed == 0) | (change.changed == 1)).all()
    assert (change.changed.sum(1) == 1).all()
    least = [fewest(board, probe, net, 0.9) for board in found]
    reachable = torch.tensor([n is not None for n in least])
    assert (change.reached == reachable).float().mean() >= 0.95
    extra = [
        float(change.distance["l0"][i]) / 2 - n for i, n in enumerate(least) if n is not None and change.reached[i]
    ]
    assert sum(extra) / len(extra) < 0.25  # squares; a relaxation need not find the fewest


def test_rules_of_a_board_are_never_broken():
    found, probe, net = boards()
    allowed = torch.ones(3, 2, 2, dtype=torch.bool)
    allowed[2, 0] = False  # no new piece of the third kind in the first row
    change = change_concept(net, found, probe, ChangeSettings(sparsity=0.1), parameterization=CategoryChange(allowed))
    new = change.changed.bool() & ~found.bool()
    assert not new[:, 2, 0].any()

    def legal(batch):
        return batch[:, 1].flatten(1).sum(1) <= 2

    kept = found[legal(found)]
    change = change_concept(net, kept, probe, parameterization=CategoryChange(), legal=legal)
    assert legal(change.changed[change.reached]).all()
    change = flip_concept(net, kept, probe, lambda board: single_changes(board, legal))
    assert legal(change.changed).all()


def test_the_best_legal_change_is_kept_where_the_search_leaves_what_is_legal():
    net, x, probe = linear()

    def near(batch):
        return (batch - x).norm(dim=1) <= 0.2

    change = change_concept(net, x, probe, ChangeSettings(loss="bce", target=0.9, distance_weight=0.0), legal=near)
    assert near(change.changed).all()
    assert (change.after > change.before).all()
    assert not change.reached.any()  # the target is farther away


def gap(batch):
    """By how much a board has more pieces of the second kind than of the third, or fewer."""
    count = batch.flatten(2).sum(2)
    return (count[:, 1] - count[:, 2]).abs()


def even(batch):
    return gap(batch) < 0.5


def test_a_penalty_leads_the_search_to_what_exists():
    """One piece of the second kind brings the probe to its target; the rule asks for one of the third beside it."""
    found, _, net = boards(200)
    weight = torch.zeros(3, 4)
    weight[1] = torch.tensor([6.0, 5.5, 1.0, 0.5])
    probe = probe_of(weight.flatten(), -3.0)  # logit 3 or 2.5, and log(9) = 2.2 is the target
    kept = found[even(found) & (probe.score(net(found)) < 0.5)]
    settings = ChangeSettings(target=0.9, distance_weight=0.0, sparsity=0.3, lr=0.1)
    shared = {"parameterization": CategoryChange(), "legal": even}
    without = change_concept(net, kept, probe, settings, **shared)
    led = change_concept(net, kept, probe, settings, validity=gap, validity_weight=3.0, **shared)
    assert even(led.changed[led.reached]).all()
    assert led.reached.all()
    assert without.reached.float().mean() < 0.5

    asked = []

    def heard(batch):
        asked.append(len(batch))
        return gap(batch)

    rules = {"validity": heard, "validity_weight": 3.0, "legal": even}
    concept = Concept("one", lambda x, y: x[:, 1, 0].sum(1) >= 1)
    analysis = ConceptBackprop(
        concept, "0", change=settings, parameterization=CategoryChange(), sensitivity=False, pictures=False, **rules
    )
    change = analysis.analyze(net, [(found[even(found)], found)]).changes["one"]
    assert even(change.changed[change.reached]).all()
    assert change.reached.float().mean() >= 0.9
    assert len(asked) == settings.steps + 1, "the callback hands the penalty on"


def test_tokens_change_by_both_searches_and_only_as_allowed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 4), nn.Flatten()).double()
    tokens = torch.randint(0, 20, (6, 5))
    probe = probe_of(torch.randn(20), -4.0, "1")
    goal = ChangeSettings(target=0.9, sparsity=0.1, lr=0.1)
    allowed = list(range(5, 15))
    relaxed = change_concept(net, tokens, probe, goal, parameterization=TokenChange("0", allowed, positions=[0, 2, 4]))
    exact = flip_concept(net, tokens, probe, lambda t: token_changes(t, torch.tensor(allowed)), goal, max_flips=5)
    for change in (relaxed, exact):
        new = change.changed != tokens
        assert not change.changed.is_floating_point()
        assert torch.isin(change.changed[new], torch.tensor(allowed)).all()
        torch.testing.assert_close(change.after, probe.score(net(change.changed)).detach(), rtol=1e-10, atol=0)
    assert not (relaxed.changed != tokens)[:, [1, 3]].any()
    assert exact.reached.all()
    assert relaxed.reached.float().mean() >= 0.5  # two of five positions are not its to change


@pytest.mark.parametrize(
    ("made", "inputs", "match"),
    [
        (lambda: AdditiveChange(0.0, 1.0), torch.full((1, 10), 2.0), "out of the range low=0.0, high=1.0"),
        (lambda: AdditiveChange(), torch.zeros(1, 10, dtype=torch.int64), "TokenChange"),
        (lambda: GridChange(), torch.zeros(1, 10), r"images of shape \(B, C, H, W\)"),
        (lambda: CategoryChange(), torch.full((1, 3, 2), 0.5), "one-hot"),
        (lambda: LatentChange(nn.Identity()), torch.zeros(1, 10), "no methods encode and decode"),
        (lambda: AdditiveChange(1.0, 0.0), torch.zeros(1, 10), "empty"),
        (lambda: TokenChange("0"), torch.zeros(1, 10), "not an nn.Embedding"),
    ],
)
def test_inputs_that_cannot_be_changed(made, inputs, match):
    net, _, probe = linear()
    with pytest.raises(ValueError, match=match):
        change_concept(net, inputs, probe, parameterization=made())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"direction": "up"}, "direction='up'"),
        ({"steps": 0}, "steps=0"),
        ({"distance_weight": -1.0}, "distance_weight=-1.0"),
        ({"target": 1.0}, "target=1.0"),
    ],
)
def test_settings_out_of_range(settings, match):
    net, x, probe = linear()
    with pytest.raises(ValueError, match=match):
        change_concept(net, x, probe, ChangeSettings(**settings))
