"""One rule object for two fits: the second is as with a new object, unless a checkpoint or the Trainer goes on."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import torch
from conformance import Case
from lightning.pytorch.tuner import Tuner
from problems import Problem, fitted, loader
from shipped import cases

import lightning_bpfree as bpf

RULES = cases("RULES")


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def one_fit(case: Case, rule, seed: int = 0, **settings) -> tuple[pl.LightningModule, pl.Trainer]:
    torch.manual_seed(seed)
    module = case.problem()
    return module, fitted(module, case.problem.data(), rule, **settings)


@pytest.mark.parametrize("name", RULES)
def test_a_second_fit_is_as_with_a_new_rule(name):
    case = Case(RULES[name])
    rule = case.make_rule()
    first, _ = one_fit(case, rule)
    record = rule.record.state_dict()
    second, _ = one_fit(case, rule)
    assert equal(weights(first), weights(second))
    assert rule.record.state_dict() == record


@pytest.mark.parametrize("name", ["EvolutionStrategy", "ForwardForward", "TeamReinforce"])
def test_a_second_fit_of_the_same_module_begins_anew(name):
    rules = {
        "EvolutionStrategy": lambda: bpf.EvolutionStrategy("snes", population_size=4),
        "ForwardForward": lambda: bpf.ForwardForward(label="embedding", peer_normalization=0.03),
        "TeamReinforce": lambda: bpf.TeamReinforce(baseline="critic", exploration="recurrent"),
    }

    def run(share: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = Problem(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 3)))
        rule = rules[name]()
        for _ in range(2):
            if not share and isinstance(rule, bpf.NetworkRule):
                rule.uninstall(module)
            rule = rule if share else rules[name]()
            torch.manual_seed(3)
            fitted(module, loader(), rule)
        return weights(module)

    assert equal(run(share=True), run(share=False))


def test_what_was_learned_is_there_until_the_next_fit():
    given = bpf.OpenAIES(sigma=0.5, sigma_decay=0.9)
    rule = bpf.EvolutionStrategy(given, population_size=4)
    fitted(Problem(), loader(), rule)
    assert float(rule.algorithm.std) == pytest.approx(0.5 * 0.9**4)
    assert rule.algorithm.steps == 4
    assert given.steps == 0
    fitted(Problem(), loader(), rule)
    assert rule.algorithm.steps == 4


def test_a_search_that_was_given_is_gone_on_with_in_each_fit():
    learned = bpf.EvolutionStrategy("snes", population_size=4)
    fitted(Problem(), loader(), learned)
    rule = bpf.EvolutionStrategy(learned.algorithm, population_size=4)
    for _ in range(2):
        fitted(Problem(), loader(), rule)
        assert rule.algorithm.steps == 8


def test_an_algorithm_that_was_set_between_fits_is_taken():
    rule = bpf.EvolutionStrategy("snes", population_size=4)
    fitted(Problem(), loader(), rule)
    rule.algorithm = bpf.OpenAIES(sigma=0.3, sigma_decay=0.5)
    for _ in range(2):
        fitted(Problem(), loader(), rule)
        assert float(rule.algorithm.std) == pytest.approx(0.3 * 0.5**4)


def said(caplog) -> bool:
    return any("starts over" in record.getMessage() for record in caplog.records)


def test_it_says_so(caplog):
    caplog.set_level(logging.INFO)
    rule = bpf.ZerothOrder()
    fitted(Problem(), loader(), rule)
    assert not said(caplog)
    fitted(Problem(), loader(), rule)
    assert said(caplog)


def test_a_checkpoint_is_gone_on_with(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def rule():
        return bpf.EvolutionStrategy(bpf.OpenAIES(sigma=0.5, sigma_decay=0.9), population_size=4)

    whole, _ = one_fit(Case(rule, Plain), rule(), max_epochs=2)
    one = rule()
    _, trainer = one_fit(Case(rule, Plain), one)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = one_fit(Case(rule, Plain), one, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert equal(weights(whole), weights(resumed))
    assert float(one.algorithm.std) == pytest.approx(0.5 * 0.9**8)
    third, _ = one_fit(Case(rule, Plain), one, max_epochs=2)
    assert equal(weights(whole), weights(third))


class Plain(Problem):
    data = staticmethod(loader)


def test_a_state_that_was_loaded_by_hand_is_gone_on_with(tmp_path):
    learned = bpf.EvolutionStrategy("snes", population_size=4)
    fitted(Problem(), loader(), learned)
    rule = bpf.EvolutionStrategy("snes", population_size=4)
    fitted(Problem(), loader(), rule)
    rule.load_state_dict(learned.state_dict())
    fitted(Problem(), loader(), rule)
    assert rule.algorithm.steps == 8
    fitted(Problem(), loader(), rule)
    assert rule.algorithm.steps == 4


def test_a_checkpoint_that_was_tested_is_not_gone_on_with(tmp_path):
    class Tested(Problem):
        def test_step(self, batch, index):
            return None

    rule = bpf.EvolutionStrategy("snes", population_size=4)
    module = Tested()
    trainer = fitted(module, loader(), rule)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer.test(module, loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False, weights_only=False)
    assert rule.algorithm.steps == 4
    fitted(Problem(), loader(), rule)
    assert rule.algorithm.steps == 4


def test_the_same_trainer_goes_on():
    rule, module = bpf.EvolutionStrategy("snes", population_size=4), Problem()
    trainer = fitted(module, loader(), rule)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert rule.algorithm.steps == 8
    assert rule.record.history == [{"rule": "EvolutionStrategy", "first_epoch": 0, "last_epoch": 1}]


def test_a_fit_that_failed_leaves_nothing_to_the_next(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("out of luck")

    case = Case(lambda: bpf.EvolutionStrategy("snes", population_size=4), Plain)
    fresh, _ = one_fit(case, case.make_rule())
    rule = case.make_rule()
    torch.manual_seed(1)
    with pytest.raises(KeyError):
        fitted(Problem(), loader(), rule, Fails())
    again, _ = one_fit(case, rule)
    assert equal(weights(fresh), weights(again))


def test_the_seed_is_that_of_the_second_fit():
    rule = bpf.ZerothOrder()
    one_fit(Case(bpf.ZerothOrder, Plain), rule, seed=0)
    again, _ = one_fit(Case(bpf.ZerothOrder, Plain), rule, seed=5)
    fresh, _ = one_fit(Case(bpf.ZerothOrder, Plain), bpf.ZerothOrder(), seed=5)
    assert equal(weights(fresh), weights(again))


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_tuner_leaves_no_trace(tmp_path):
    class Rates(Problem):
        def train_dataloader(self):
            return loader()

    def run(tune: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module, rule = Rates(), bpf.EvolutionStrategy("snes", population_size=4)
        options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = pl.Trainer(
            callbacks=[rule], max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path, **options
        )
        if tune:
            Tuner(trainer).lr_find(module, num_training=5, update_attr=False)
        torch.manual_seed(1)
        trainer.fit(module)
        assert rule.algorithm.steps == 8
        return weights(module)

    assert equal(run(tune=False), run(tune=True))


def test_the_mean_of_gradient_alignment_begins_anew():
    alignment = bpf.GradientAlignment(every_n_steps=1)
    for _ in range(2):
        fitted(Problem(), loader(), bpf.ZerothOrder(), alignment)
        assert alignment.measured == 4
