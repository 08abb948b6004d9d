"""Alignment measures any rule against backprop, leaves no trace, and costs nothing on other steps."""

import pytest
import torch
from conformance import assert_equal, run, state
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, fitted, loader

from lightning_bpfree import Backprop, ForwardGradient, GradientAlignment, TrainingRule, ZerothOrder
from lightning_bpfree.core.step import Estimate


def test_backprop_is_aligned_with_itself_batch_norm_and_dropout_included():
    torch.manual_seed(0)
    alignment = GradientAlignment(every_n_steps=1)
    trainer = fitted(Problem(), loader(), Backprop(), alignment)
    assert alignment.mean_cosine == pytest.approx(1.0, abs=1e-6)  # the same gradient twice, float32
    metrics = trainer.callback_metrics
    assert float(metrics["bpfree/norm_ratio"]) == pytest.approx(1.0, abs=1e-6)
    layers = {key.rpartition("/")[2] for key in metrics if key.startswith("bpfree/cosine_to_backprop/")}
    assert layers == {"net.inner", "net.again", "net.norm", "net.head"}
    assert float(metrics["bpfree/mean_cosine"]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("make", [Backprop, lambda: ForwardGradient(2), lambda: ZerothOrder(2)])
def test_measuring_changes_nothing(make):
    torch.manual_seed(0)
    watched = Problem()
    one = fitted(watched, loader(), make(), GradientAlignment(every_n_steps=2), max_epochs=2)
    alone, two = run(make, max_epochs=2)
    assert_equal(state(watched), state(alone))
    for key in ("train_loss", "train_acc", "bpfree/forward_evals"):
        assert torch.equal(one.callback_metrics[key], two.callback_metrics[key])


def test_only_measured_steps_cost_an_evaluation():
    torch.manual_seed(0)
    module = Problem()
    alignment = GradientAlignment(every_n_steps=3)
    with pytest.warns(UserWarning, match="log_every_n_steps=2"):
        fitted(module, loader(rows=128), Backprop(), alignment, log_every_n_steps=2)
    assert alignment.measured == 2  # steps 3 and 6 of 8
    assert module.evaluations == 8 + 2 + 1  # and a rehearsal in the first of them


def test_once_an_optimizer_step_under_accumulation():
    alignment = GradientAlignment(every_n_steps=1)
    fitted(Problem(), loader(rows=128), ForwardGradient(), alignment, accumulate_grad_batches=4)
    assert alignment.measured == 2


def test_a_rule_that_leaves_its_gradient_to_autograd():
    class Twice(TrainingRule):
        """Differentiates twice the loss: parallel to backprop, twice as long."""

        reevaluates = False

        def estimate(self, step):
            return Estimate(2 * step.loss())

    alignment = GradientAlignment(every_n_steps=1)
    trainer = fitted(Problem(), loader(), Twice(), alignment)
    assert alignment.mean_cosine == pytest.approx(1.0, abs=1e-6)
    assert float(trainer.callback_metrics["bpfree/norm_ratio"]) == pytest.approx(2.0, abs=1e-5)


def test_only_the_trained_part_is_compared():
    alignment = GradientAlignment(every_n_steps=1)
    trainer = fitted(Problem(), loader(), ForwardGradient(params="net.head.*"), alignment)
    layers = [key for key in trainer.callback_metrics if key.startswith("bpfree/cosine_to_backprop/")]
    assert layers == ["bpfree/cosine_to_backprop/net.head"]


def test_refusals():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        GradientAlignment(every_n_steps=0)
    with pytest.raises(MisconfigurationException, match="no rule is among the callbacks"):
        fitted(Problem(), loader(), GradientAlignment())

    class Flat(Problem):
        def training_step(self, batch, index):
            return float(super().training_step(batch, index).detach())

    with pytest.raises(MisconfigurationException, match="differentiable"):
        fitted(Flat(), loader(), ZerothOrder(), GradientAlignment(every_n_steps=1))
