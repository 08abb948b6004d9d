"""Bad input gets an error that names the argument, what was given and the cure; nothing is lost."""

import logging

import numpy as np
import pytest
import torch
from conformance import assert_equal, state
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, fitted, loader

from lightning_bpfree import ForwardGradient, ZerothOrder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardGradient(0), "num_directions=0: give a whole number of at least 1"),
        (lambda: ForwardGradient(directions="cauchy"), "directions='cauchy': choose 'gaussian' or 'rademacher'"),
        (lambda: ForwardGradient(chunk_size=0), "chunk_size=0: give a whole number of at least 1, 'auto' or 'fastest'"),
        (lambda: ZerothOrder(-1), "num_directions=-1"),
        (lambda: ZerothOrder(sigma=0.0), r"sigma=0\.0: give a positive number"),
        (lambda: ZerothOrder(sigma=float("nan")), "sigma=nan: give a positive number"),
        (lambda: ZerothOrder(scheme="backward"), "scheme='backward': choose 'central' or 'forward'"),
        (lambda: ZerothOrder(start_epoch=-1), "start_epoch=-1: give a whole number of at least 0"),
        (lambda: ZerothOrder(start_epoch=2, stop_epoch=2), "stop_epoch=2 must be above start_epoch=2"),
        (lambda: ZerothOrder(on_nonfinite="ignore"), "on_nonfinite='ignore': choose 'raise' or 'skip'"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("precision", "sigma", "safe"),
    [("bf16-mixed", 1e-3, "sigma=0.009"), ("32-true", 1e-6, "sigma=3e-05"), ("bf16-true", 1e-4, "sigma=0.009")],
)
def test_a_sigma_that_rounding_swallows_is_refused_with_a_safe_one(precision, sigma, safe):
    with pytest.raises(MisconfigurationException, match=safe):
        fitted(Problem(), loader(), ZerothOrder(sigma=sigma), precision=precision)


@pytest.mark.parametrize(("precision", "sigma"), [("32-true", 1e-3), ("bf16-mixed", 1e-2), ("64-true", 1e-3)])
def test_sigma_by_default_suits_the_precision(precision, sigma, caplog):
    data = loader()
    if precision == "64-true":
        data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    with caplog.at_level(logging.INFO):
        fitted(Problem(), data, ZerothOrder(), precision=precision)
    assert f"sigma {sigma:g}" in caplog.text


class SometimesNan(Problem):
    """NaN in the given evaluations of the second batch."""

    bad: tuple[int, ...] = ()

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        if index == 1 and self.calls.count(1) - 1 in self.bad:
            return loss * float("nan")
        return loss


@pytest.mark.parametrize(
    ("rule", "bad", "named"),
    [
        (lambda **how: ZerothOrder(3, **how), 0, "unperturbed loss"),
        (lambda **how: ZerothOrder(3, **how), 3, "k=1"),
        (lambda **how: ZerothOrder(3, scheme="forward", **how), 3, "k=2"),
        (lambda **how: ForwardGradient(3, chunk_size=1, **how), 2, "k=2"),
    ],
)
def test_nan_is_reported_with_its_direction_and_moves_nothing(rule, bad, named):
    torch.manual_seed(0)
    module = SometimesNan()
    module.bad = (bad,)
    states = []

    module.on_train_batch_start = lambda batch, index: states.append(state(module))
    with pytest.raises(RuntimeError, match=rf"{named}.*batch 1.*No parameter has changed.*on_nonfinite='skip'"):
        fitted(module, loader(), rule())
    parameters = dict(module.named_parameters())
    assert all(torch.equal(parameters[name], states[1][name]) for name in parameters)

    torch.manual_seed(0)
    module, made = SometimesNan(), rule(on_nonfinite="skip")
    module.bad = (bad,)
    with pytest.warns(UserWarning, match=rf"{named}.*batch 1 is skipped"):
        fitted(module, loader(), made)
    assert made.record.skipped == 1
    assert [bool(g) for g in module.gradients] == [True, False, True, True]


def test_nan_in_a_skipped_batch_leaves_the_others_as_they_were():
    def trained(bad):
        torch.manual_seed(0)
        module = SometimesNan(lr=0.0)
        module.bad = bad
        fitted(module, loader(), ZerothOrder(2, on_nonfinite="skip"))
        return module.gradients

    with pytest.warns(UserWarning, match="skipped"):
        skipped = trained((1,))
    whole = trained(())
    assert_equal(skipped[0], whole[0])
    assert_equal(skipped[2], whole[2])


def test_objectives_without_a_derivative_train_by_zeroth_order_only():
    class Counts(Problem):
        def training_step(self, batch, index):
            x, y = batch
            scores = self.net(x).detach().numpy().astype(np.float64)
            right = scores[np.arange(len(y)), y.numpy()]
            return float(np.mean(np.maximum(0.0, 1.0 + scores.max(1) - right)))  # a hinge loss in NumPy

    torch.manual_seed(0)
    module = Counts(lr=0.05)
    losses = []
    module.on_train_batch_end = lambda outputs, batch, index: losses.append(float(outputs["loss"]))
    fitted(module, loader(rows=256, batch_size=64), ZerothOrder(16), max_epochs=15)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    with pytest.raises(MisconfigurationException, match=r"ZerothOrder\(\) needs no derivative"):
        fitted(Counts(), loader(), ForwardGradient())


def test_an_untested_strategy_is_refused_unless_allowed():
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Strange(SingleDeviceStrategy):
        pass

    fitted(Problem(), loader(), ZerothOrder(), strategy=Strange())  # a subclass of a tested one is fine
    other = type("FSDPStrategy", (), {})()
    from lightning_bpfree.training.checks import _check_strategy

    with pytest.raises(MisconfigurationException, match="allow_untested=True"):
        _check_strategy(ZerothOrder(), type("Trainer", (), {"strategy": other})())
    _check_strategy(ZerothOrder(allow_untested=True), type("Trainer", (), {"strategy": other})())
