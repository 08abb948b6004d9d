"""What every training rule must hold to, whatever it estimates: ``check_rule(make_rule)`` runs all of it.

Each property is a function of a rule factory; `test_conformance.py` runs them one by one, so that a failure has a name.
Tolerances: `torch.equal` where the same algorithm runs on the same numbers; otherwise stated at the line.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import MappingProxyType

import lightning.pytorch as pl
import pytest
import torch
from conformance_problem import Case, ConformanceProblem, MakeRule, assert_equal, state
from conformance_steps import several_dataloaders, the_run_proves_its_rule, the_signature_is_kept
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from problems import Problem, fitted, loader

from lightning_bpfree import Backprop


def run(
    make_rule: MakeRule | None, *, lr: float = 0.1, seed: int = 0, module: Problem | None = None, data=None, **settings
):
    """Fit a problem for a test of one rule; returns module and Trainer. Equal seeds give equal weights and dropout."""
    torch.manual_seed(seed)
    module = Problem(lr=lr) if module is None else module
    trainer = fitted(module, loader() if data is None else data, *([make_rule()] if make_rule else []), **settings)
    return module, trainer


# --- evaluating leaves no trace -----------------------------------------------------------------------------------


def parameters_come_back_bit_for_bit(case: Case) -> None:
    torch.manual_seed(0)
    module = case.problem(lr=0.0)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    fitted(module, case.problem.data(), case.make_rule())
    assert_equal(before, dict(module.named_parameters()))


def buffers_move_once_a_step(case: Case) -> None:
    plain, _ = case.run(False, lr=0.0)
    ruled, _ = case.run(lr=0.0)
    expected = dict(plain.named_buffers())
    for name, buffer in ruled.named_buffers():
        if not buffer.is_floating_point():
            assert torch.equal(buffer, expected[name]), name
        elif case.make_rule().estimates_user_loss:  # else it changes what the network sees, and so the statistics
            # One evaluation in forward mode may sum in another order: equal math in float32.
            torch.testing.assert_close(buffer, expected[name], rtol=1e-5, atol=1e-6)


def logs_and_metrics_count_once(case: Case) -> None:
    _, plain = case.run(False, lr=0.0)
    _, ruled = case.run(lr=0.0)
    assert {"train_loss", "train_acc"} <= ruled.callback_metrics.keys()
    # A mean over evaluations may hide that there were several: those around a point cancel.
    assert ruled.callback_metrics["steps_logged"] == plain.callback_metrics["steps_logged"] == 4
    if not case.make_rule().estimates_user_loss:
        return  # it changes what the network returns, and so the values
    for key in ("train_loss", "train_acc"):
        torch.testing.assert_close(ruled.callback_metrics[key], plain.callback_metrics[key], rtol=1e-5, atol=0)


def random_streams_move_as_in_a_plain_step(case: Case) -> None:
    case.run(False, lr=0.0)
    plain = torch.rand(3)
    case.run(lr=0.0)
    assert torch.equal(torch.rand(3), plain)


# --- the gradient goes Lightning's road ---------------------------------------------------------------------------


def accumulation_is_the_mean_of_micro_batches(case: Case) -> None:
    single, _ = case.run(lr=0.0)
    double, _ = case.run(lr=0.0, accumulate_grad_batches=2)
    assert len(double.gradients) == 2
    for i, accumulated in enumerate(double.gradients):
        for name, gradient in accumulated.items():
            mean = (single.gradients[2 * i][name] + single.gradients[2 * i + 1][name]) / 2
            torch.testing.assert_close(gradient, mean, rtol=1e-5, atol=1e-7)  # another order of a float32 sum


def clipping_acts_on_the_estimate(case: Case) -> None:
    lr = 1e-3
    torch.manual_seed(0)
    module = case.problem(lr=lr)
    before = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    fitted(module, case.problem.data(rows=16), case.make_rule(), gradient_clip_val=1e-2)
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    # One SGD step of at most lr * clip; 1e-6 for rounding of parameters of size 1.
    assert 0 < float((after - before).norm()) <= lr * 1e-2 + 1e-6


def mixed_precision_gives_nearly_the_same_estimate(case: Case) -> None:
    full, _ = case.run(lr=0.0)
    mixed, _ = case.run(lr=0.0, precision="bf16-mixed")
    a, b = (torch.cat([g.flatten() for g in m.gradients[0].values()]) for m in (full, mixed))
    # bfloat16 keeps 8 bits: slopes agree to some per cent, hence a cosine of 1 - O(1e-3); dropout masks are equal.
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.98


# --- resume -------------------------------------------------------------------------------------------------------


def resume_is_exact(case: Case) -> None:
    def part(epochs: int, folder: str, ckpt_path: str | None = None):
        checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        rule = case.make_rule()
        torch.manual_seed(3)
        module = case.problem(optimizer="adamw", lr=0.01)
        fitted(
            module,
            case.problem.data(shuffle=True),
            rule,
            checkpoint,
            ckpt_path=ckpt_path,
            max_epochs=epochs,
            enable_checkpointing=True,
            default_root_dir=folder,
        )
        return module, rule

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # on purpose
        whole, whole_rule = part(4, folder)
        torch.manual_seed(99)  # the resumed process starts from another random state
        again, again_rule = part(4, str(Path(folder) / "again"), str(Path(folder) / "epoch=1.ckpt"))
        assert_equal(state(whole), state(again))
        one, other = whole_rule.record.state_dict(), again_rule.record.state_dict()
        assert one == other
        saved = torch.load(Path(folder) / "epoch=3.ckpt", weights_only=True)
        assert saved["bpfree"]["rule"] == type(whole_rule).__name__
        case.problem().load_state_dict(saved["state_dict"], strict=True)  # a plain module takes it


def resuming_under_another_rule_is_said(case: Case) -> None:
    class Other(Backprop):
        pass

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
        fitted(
            case.problem(), case.problem.data(), Other(), checkpoint, enable_checkpointing=True, default_root_dir=folder
        )
        path = str(Path(folder) / "last.ckpt")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            with pytest.warns(UserWarning, match="was trained by Other"):
                fitted(case.problem(), case.problem.data(), case.make_rule(), ckpt_path=path, max_epochs=2)
            strict = case.make_rule(strict_rule=True)
            with pytest.raises(MisconfigurationException, match="resume with Other"):
                fitted(case.problem(), case.problem.data(), strict, ckpt_path=path, max_epochs=2)
        with pytest.warns(UserWarning, match="Other"):  # without any rule, Lightning names what is missing
            fitted(case.problem(), case.problem.data(), ckpt_path=path, max_epochs=2)


# --- swap and undo ------------------------------------------------------------------------------------------------


def undone_after_fit_and_after_an_exception(case: Case) -> None:
    module, _ = case.run()
    assert not {"training_step", "log", "log_dict"} & module.__dict__.keys()

    class Interrupted(pl.Callback):
        def on_train_batch_end(self, *args) -> None:
            raise RuntimeError("stop here")

    broken, rule = case.problem(), case.make_rule()
    with pytest.raises(RuntimeError, match="stop here"):
        fitted(broken, case.problem.data(), rule, Interrupted())
    assert not {"training_step", "log", "log_dict"} & broken.__dict__.keys()
    assert rule.original_step is None

    class Breaks(case.problem):
        def training_step(self, batch, index):
            if self.evaluations:
                raise RuntimeError("in the step")
            return super().training_step(batch, index)

    inside = Breaks()
    with pytest.raises(RuntimeError, match="in the step"):
        fitted(inside, case.problem.data(), case.make_rule())
    assert all(isinstance(p, torch.nn.Parameter) for p in inside.parameters())
    assert not {"training_step", "log", "log_dict"} & inside.__dict__.keys()


def a_step_that_someone_else_has_replaced_is_put_back(case: Case) -> None:
    torch.manual_seed(0)
    module = case.problem()
    original = module.training_step

    def mine(batch, batch_idx):
        return original(batch, batch_idx)

    module.training_step = mine
    fitted(module, case.problem.data(), case.make_rule())
    assert module.training_step is mine


# --- which parameters, which epochs -------------------------------------------------------------------------------


def other_parameters_stay_untouched(case: Case) -> None:
    torch.manual_seed(0)
    module = case.problem(optimizer="adamw")  # weight decay would move them even with a gradient of zero
    before = {n: p.clone() for n, p in module.named_parameters()}
    fitted(module, case.problem.data(), case.make_rule(params=case.problem.head), accumulate_grad_batches=2)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == (not fnmatchcase(name, case.problem.head))


def frozen_and_tied_weights(case: Case) -> None:
    torch.manual_seed(0)
    module = case.problem()
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    places = {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
    fitted(module, case.problem.data(), case.make_rule())
    assert_equal(frozen, {name: p for name, p in module.named_parameters() if not p.requires_grad})
    assert places == {name: id(parameter) for name, parameter in module.named_parameters(remove_duplicate=False)}
    once = {name for name, _ in module.named_parameters()}
    trained = module.gradients[0].keys()
    assert trained <= once - frozen.keys()
    assert {places[name] for name in places.keys() - once} <= {places[name] for name in trained}  # tied weights too


def epochs_outside_the_window_are_plain_backprop(case: Case) -> None:
    plain, _ = case.run(False, max_epochs=1)
    warm, _ = Case(partial(case.make_rule, start_epoch=1), case.problem).run(max_epochs=1)
    assert_equal(state(plain), state(warm))
    rule = case.make_rule(start_epoch=1, stop_epoch=2)
    active: list[float] = []

    class Whose(pl.Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            active.append(float(trainer.callback_metrics["bpfree/active"]))

    torch.manual_seed(0)
    fitted(case.problem(), case.problem.data(), rule, Whose(), max_epochs=3)
    assert active == [0.0, 1.0, 0.0]
    name = type(rule).__name__
    if name != "Backprop":
        assert [(e["rule"], e["first_epoch"], e["last_epoch"]) for e in rule.record.history] == [
            ("Backprop", 0, 0),
            (name, 1, 1),
            ("Backprop", 2, 2),
        ]


# --- shapes of training steps -------------------------------------------------------------------------------------


def dict_and_none_returned(case: Case) -> None:
    outputs = []

    class Sees(pl.Callback):
        def on_train_batch_end(self, trainer, module, output, *args) -> None:
            outputs.append(output)

    torch.manual_seed(0)
    module = case.problem(returns="dict")
    fitted(module, case.problem.data(), case.make_rule(), Sees())
    assert outputs[0]["logits"].shape[0] == 16
    assert len(module.gradients) == 4

    torch.manual_seed(0)
    module = case.problem(returns="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`training_step` returned `None`")  # Lightning says so once a process
        fitted(module, case.problem.data(), case.make_rule())
    assert [bool(g) for g in module.gradients] == [True, False, True, False]


# --- proof and refusals -------------------------------------------------------------------------------------------


def refusals_name_the_cure(case: Case) -> None:
    boring = torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"automatic_optimization=False.*functional"):
        fitted(ManualOptimBoringModel(), boring, case.make_rule())

    class Eats(BoringModel):
        def training_step(self, dataloader_iter):
            raise AssertionError("unreachable")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using the `dataloader_iter` step flavor")
        with pytest.raises(MisconfigurationException, match=r"dataloader_iter.*batch_idx"):
            fitted(Eats(), boring, case.make_rule())

    class Second(Backprop):
        pass

    with pytest.raises(MisconfigurationException, match="Two training rules"):
        fitted(case.problem(), case.problem.data(), case.make_rule(), Second())
    with pytest.raises(ValueError, match=r"'nowhere.\*' matches none"):
        fitted(case.problem(), case.problem.data(), case.make_rule(params="nowhere.*"))

    class Vector(case.problem):
        def training_step(self, batch, index):
            return torch.stack([super().training_step(batch, index)] * 2)

    with pytest.raises(ValueError, match=r"shape \(2,\).*loss\.mean\(\)"):
        fitted(Vector(), case.problem.data(), case.make_rule())


PROPERTIES = [
    parameters_come_back_bit_for_bit,
    buffers_move_once_a_step,
    logs_and_metrics_count_once,
    random_streams_move_as_in_a_plain_step,
    accumulation_is_the_mean_of_micro_batches,
    clipping_acts_on_the_estimate,
    mixed_precision_gives_nearly_the_same_estimate,
    resume_is_exact,
    resuming_under_another_rule_is_said,
    undone_after_fit_and_after_an_exception,
    a_step_that_someone_else_has_replaced_is_put_back,
    the_signature_is_kept,
    other_parameters_stay_untouched,
    frozen_and_tied_weights,
    epochs_outside_the_window_are_plain_backprop,
    dict_and_none_returned,
    several_dataloaders,
    the_run_proves_its_rule,
    refusals_name_the_cure,
]


def check_rule(
    make_rule: MakeRule,
    problem: type[ConformanceProblem] = ConformanceProblem,
    *,
    leave_out: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run every property over the rules that ``make_rule(**settings)`` makes.

    Args:
        make_rule: the rule's class, or a function that takes settings of :class:`TrainingRule`.
        problem: what the rule is tried on; the default is a classifier whose network can be cut into blocks.
        leave_out: names of properties that the rule cannot hold to, and why.

    Raises:
        ValueError: if there is no property of such a name.
    """
    unknown = leave_out.keys() - {holds.__name__ for holds in PROPERTIES}
    if unknown:
        raise ValueError(f"leave_out: no property is called {', '.join(sorted(unknown))}.")
    for holds in PROPERTIES:
        if holds.__name__ not in leave_out:
            holds(Case(make_rule, problem))
