"""Probes: scores on samples they have not seen, random labels at chance, and directions by their formulas."""

import math

import pytest
import torch

from lightning_bpfree.methods.concept_backprop.probe import ProbeSettings, fit_probe


def gaussian(rows=600, width=6, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("penalty", ["l2", "l1", "mean_difference"])
def test_a_linear_concept_is_read_and_random_labels_are_not(penalty):
    x = gaussian()
    found = fit_probe(x, (x[:, 1] > 0.3).double(), ProbeSettings(penalty, 1e-3, controls=20))
    assert found.score > 0.8  # the mean difference puts its threshold less well than a fit
    # 2 (accuracy - 1/2) of 180 held-out coin flips, of two classes: standard deviation at most 2 sqrt(1/4 / 60)
    spread = 2 * math.sqrt(0.25 / 60)
    assert abs(found.control) < 4 * spread / math.sqrt(20)
    assert all(abs(control) < 4 * spread for control in found.controls)
    assert found.selectivity == pytest.approx(found.score - found.control)


def test_a_continuous_concept_has_the_score_of_its_noise():
    x = gaussian(4000)
    noise = gaussian(4000, 1, seed=5)[:, 0]
    found = fit_probe(x, 2 * x[:, 0] + noise, ProbeSettings(strength=0.0), kind="continuous")
    # R^2 = 4 / (4 + 1); its standard error on 1200 samples is about 2 sqrt(R^2) (1 - R^2) / sqrt(1200) = 0.0103
    assert found.score == pytest.approx(0.8, abs=4 * 0.0103)
    assert abs(found.control) < 0.05


def test_the_mean_difference_probe_points_from_all_to_the_concept():
    x = gaussian() * torch.tensor([1.0, 5.0, 1.0, 1.0, 0.2, 1.0], dtype=torch.float64)
    labels = (x[:, 1] + x[:, 2] > 0).double()
    settings = ProbeSettings("mean_difference")
    found = fit_probe(x, labels, settings).probe
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(x), generator=generator)
    train = torch.cat([g[round(0.3 * len(g)) :] for g in (order[labels[order] == value] for value in (0, 1))])
    part = x[train]
    standard = (part - part.mean(0)) / part.std(0, correction=0)
    direction = (standard[labels[train] == 1].mean(0) - standard.mean(0)) / part.std(0, correction=0)
    cosine = torch.nn.functional.cosine_similarity(found.weight, direction, dim=0)
    assert float(cosine) == pytest.approx(1, rel=1e-10)  # the same mathematics in float64


def test_patterns_are_what_the_data_does_along_the_logit():
    """A copy of a feature, of which the probe needs none, is a part of the pattern: cov(h) w / (w' cov(h) w)."""
    x = gaussian(2000)
    x[:, 5] = x[:, 0] + 0.01 * x[:, 5]
    found = fit_probe(x, (x[:, 0] > 0).double(), ProbeSettings("l1", 0.05)).probe
    slopes = found.pattern / found.pattern[0]
    assert float(slopes[5]) == pytest.approx(1, abs=0.02)
    assert slopes[1:5].abs().max() < 0.15  # four standard errors of a correlation over 1400 samples


def test_scores_do_not_see_the_units_of_features():
    x = gaussian()
    labels = (x[:, 0] > 0).double()
    scale, shift = torch.logspace(-3, 3, 6, dtype=torch.float64), torch.arange(6.0, dtype=torch.float64)
    plain, scaled = fit_probe(x, labels), fit_probe(x * scale + shift, labels)
    assert plain.score == scaled.score
    torch.testing.assert_close(
        plain.probe.logit(x),
        scaled.probe.logit(x * scale + shift),
        rtol=1e-4,
        atol=1e-4,  # both stop at 1e-7
    )


def test_constant_features_are_left_out():
    x = gaussian()
    x[:, 3] = 7.0
    assert float(fit_probe(x, (x[:, 0] > 0).double()).probe.weight[3]) == 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"penalty": "l3"}, "penalty='l3'"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"controls": 0}, "controls=0"),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(ValueError, match=match):
        ProbeSettings(**settings)


def test_labels_and_features_that_do_not_fit():
    with pytest.raises(ValueError, match="labels: 3 for features"):
        fit_probe(torch.zeros(4, 2), torch.zeros(3))
    broken = gaussian()
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        fit_probe(broken, (broken[:, 1] > 0).double())
    found = fit_probe(gaussian(), (gaussian()[:, 1] > 0).double()).probe
    with pytest.raises(ValueError, match="was fitted on 6 features"):
        found.logit(torch.zeros(1, 7))
