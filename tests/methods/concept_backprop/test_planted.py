"""What has been put into a network is found in it, and what has not is not."""

import pytest
import torch
from planted import CONCEPTS, planted
from torch import nn

from lightning_bpfree.methods.concept_backprop.callback import ConceptBackprop
from lightning_bpfree.methods.concept_backprop.change import ChangeSettings
from lightning_bpfree.methods.concept_backprop.concepts import Concept
from lightning_bpfree.methods.concept_backprop.parameterizations import AdditiveChange
from lightning_bpfree.methods.concept_backprop.probe import LinearProbe
from lightning_bpfree.methods.concept_backprop.sensitivity import concept_sensitivity, tcav


@pytest.fixture(scope="module")
def found():
    net, x, y = planted()
    analysis = ConceptBackprop(
        CONCEPTS,
        ["1", "3"],
        change=ChangeSettings(target=0.9, distance="l1", steps=100),
        parameterization=AdditiveChange(0.0, 1.0),
        change_layer="1",
        pictures=False,
    )
    return analysis.analyze(net, [(x, y)])


def test_the_difference_lies_on_the_planted_features(found):
    change = found.changes["planted"]
    assert change.before.max() < 0.1
    assert (change.after > 0.89).all()
    shares = change.delta.abs().sum(0) / change.delta.abs().sum()
    assert float(shares[0] + shares[3]) >= 0.8
    decoy = found.changes["decoy"].delta.abs().sum(0)
    assert float(decoy[7] / decoy.sum()) >= 0.8


def test_a_decoy_can_be_read_and_is_not_used(found):
    assert found.detections["decoy", "1"].score > 0.8
    assert found.sensitivities["planted", "1"].used
    assert not found.sensitivities["decoy", "1"].used
    assert found.sensitivities["planted", "1"].p_value < 0.05


def test_random_labels_are_at_chance(found):
    for detection in found.detections.values():
        # 600 held-out samples: 2 (accuracy - 1/2) has a deviation of at most 2 sqrt(1/4 / 600) sqrt(2); R^2 loses the
        # variance of 40 weights on 1400 samples
        assert abs(detection.control) < 4 * 0.058 if "sum" not in detection.probe.concept else detection.control < 0.05


def test_the_output_moves_with_the_planted_concept_and_not_with_the_decoy(found):
    assert found.entanglement["planted"]["output"] > 0.8
    assert found.entanglement["decoy"]["output"] < 0.2
    assert found.entanglement["planted"]["sum"] > 1  # the same two features, in standard deviations
    assert abs(found.entanglement["planted"]["decoy"]) < 0.1
    assert found.entanglement["planted"]["planted"] > 0.8


def test_orthogonal_concepts_are_not_entangled_and_copies_are():
    """Exact on a linear network: the smallest change for one axis leaves the other's score alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=generator)
    x[:, 3] = x[:, 0]
    concepts = [Concept(f"axis{i}", lambda x, y, i=i: x[:, i] > 0) for i in (0, 1, 3)]
    analysis = ConceptBackprop(concepts, "0", sensitivity=False, pictures=False, max_samples=None)
    matrix = analysis.analyze(nn.Sequential(nn.Identity()), [(x, x)]).entanglement
    assert abs(matrix["axis0"]["axis1"]) < 0.05
    assert abs(matrix["axis1"]["axis0"]) < 0.05
    assert matrix["axis0"]["axis3"] == pytest.approx(
        matrix["axis0"]["axis0"], abs=1e-3
    )  # probes of equal features are equal


def test_the_effect_of_a_linear_head_is_the_correlation():
    """One standard deviation along the pattern moves a linear output by its correlation with the probe's logit."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator)
    x = torch.randn(3000, 5, generator=generator) @ mixing
    net = nn.Sequential(nn.Identity(), nn.Linear(5, 1))
    weight = torch.randn(5, generator=generator, dtype=torch.float64)
    line = (x.double() - x.double().mean(0)) @ weight
    pattern = (x.double() - x.double().mean(0)).T @ line / len(x) / line.square().mean()
    probe = LinearProbe("c", "0", "binary", weight, torch.tensor(0.0), pattern, float(line.std(correction=0)))
    effect = concept_sensitivity(net, x, probe, features=x)
    output = net(x).detach().squeeze(1).double()
    expected = torch.corrcoef(torch.stack([output, line]))[0, 1]
    assert effect.effect == pytest.approx(abs(float(expected)), rel=1e-3)  # float32 outputs; std of N against N - 1
    assert effect.sign == pytest.approx(float(expected), rel=1e-3)


def test_tcav_is_the_sign_of_the_slope_by_autograd():
    net, x, _ = planted(epochs=2)
    weight = torch.randn(40, dtype=torch.float64)
    probe = LinearProbe("c", "1", "binary", weight, torch.tensor(0.0))
    hidden = net[1](net[0](x[:50])).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(net[4](net[3](net[2](hidden))).sum(), [hidden])
    along = slopes.double() @ (weight / weight.norm())
    scores = tcav(net, x[:50], probe)
    assert scores["sign_count"] == float((along > 0).double().mean())
    assert scores["magnitude"] == pytest.approx(float(along.clamp_min(0).sum() / along.abs().sum()), rel=1e-5)


def test_tables_name_what_is_used(found):
    table = found.table()
    assert "| planted | 1 |" in table
    assert table.splitlines()[2].endswith("| yes |")


@pytest.mark.parametrize("direction", ["raise", "lower"])
def test_inputs_to_change_are_those_whose_labels_lack_the_concept(direction):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).double()
    labels[1::8] = 1 - labels[1::8]  # some are labeled against what the probe will say of them
    labels[::4] = torch.nan
    concept = Concept("c", key="c")
    analysis = ConceptBackprop(
        concept, "0", inputs="x", change=ChangeSettings(direction, steps=2), sensitivity=False, num_inputs=20
    )
    change = analysis.analyze(nn.Sequential(nn.Identity()), [{"x": x, "c": labels}]).changes["c"]
    wanted = 0.0 if direction == "raise" else 1.0
    rows = [int((x == row).all(1).nonzero()) for row in change.inputs]
    assert (labels[rows] == wanted).all()
