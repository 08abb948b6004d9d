"""EvolutionStrategy in a fit: estimates, objectives without derivatives, faults, state and refusals."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from evolution_problems import Net, batches
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, fitted, loader
from torch import nn

from lightning_bpfree import DES, PGPE, SNES, EvolutionStrategy, OpenAIES, SepCMAES

# --- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # statistical
def test_estimates_are_unbiased_along_the_true_gradient():
    torch.manual_seed(0)
    module = Net(nn.Linear(6, 3))
    data = batches(6)
    x, y = next(iter(data))
    true = torch.autograd.grad(F.cross_entropy(module.net(x), y), list(module.net.parameters()))
    flat = torch.cat([g.flatten() for g in true])
    ratios = []
    for seed in range(25):
        for rank in (None, 1):
            module.gradients.clear()
            rule = EvolutionStrategy(OpenAIES(sigma=0.01, shaping="raw"), 40, rank=rank, seed=seed)
            fitted(module, data, rule)
            found = torch.cat([g.flatten() for g in module.gradients[0].values()])
            ratios.append(float(found @ flat / flat.square().sum()))
    # Each has a spread of sqrt(2 / 20) = 0.32 (rank 1 somewhat more): 0.045 for the mean of 50, five of them.
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.23)


def test_noise_is_new_in_each_generation_and_the_batch_is_shared():
    module = Net(nn.Linear(6, 3))
    fitted(module, batches(6, num=2), EvolutionStrategy(OpenAIES(0.1), 4))
    assert not torch.equal(module.gradients[0]["net.weight"], module.gradients[1]["net.weight"])


def test_sgd_at_one_is_the_classical_update():
    """The module's mean goes where SNES itself puts it."""
    torch.manual_seed(0)
    module = Net(nn.Linear(6, 3), lr=1.0)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    data = batches(6)
    fitted(module, data, EvolutionStrategy(SNES(0.1), 8, seed=3, weight_decay=0.25))
    x, y = next(iter(data))
    from lightning_bpfree.core.seeds import mix

    population = SNES(0.1).ask(start, 8, mix(3, 1))
    fitness = torch.stack([F.cross_entropy(F.linear(x, m["net.weight"], m["net.bias"]), y) for m in population])
    snes = SNES(0.1)
    again = snes.ask(start, 8, mix(3, 1))
    gradient = snes.tell(again, fitness)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), 0.75 * start[name] - gradient[name])


# --- objectives ------------------------------------------------------------------------------------------------------


class Accuracy(Net):
    """Returns a number that no derivative leads to."""

    def training_step(self, batch, index):
        x, y = batch
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(-1) == y).float().mean()}


def test_the_objective_may_be_an_accuracy():
    torch.manual_seed(0)
    data = loader(rows=64, batch_size=64)
    module = Accuracy(nn.Linear(6, 3), lr=1.0)
    x, y = data.dataset.tensors
    before = float((module.net(x).argmax(-1) == y).float().mean())
    rule = EvolutionStrategy("snes", 32, objective="accuracy", maximize=True)
    trainer = fitted(module, data, rule, max_epochs=60)
    after = float((module.net(x).argmax(-1) == y).float().mean())
    assert after > max(0.8, before)  # three classes
    assert float(trainer.callback_metrics["bpfree/loss"]) == pytest.approx(-after, abs=0.1)


def test_a_reward_from_outside_torch():
    class Reward(Net):
        def training_step(self, batch, index):
            return -float(self.net.weight.detach().numpy().sum() ** 2)

    module = Reward(nn.Linear(6, 3), lr=1.0)
    before = float(module.net.weight.detach().sum() ** 2)
    fitted(module, batches(6, num=60), EvolutionStrategy("snes", 16, maximize=True))
    assert float(module.net.weight.detach().sum() ** 2) < before / 100


def test_an_objective_that_is_not_there():
    rule = EvolutionStrategy(population_size=4, objective="acc")
    with pytest.raises(
        ValueError, match=r"objective='acc' is not in the output of training_step \(\['accuracy', 'loss'\]\)"
    ):
        fitted(Accuracy(nn.Linear(6, 3)), batches(6), rule)
    with pytest.raises(ValueError, match=r"objective='acc'.*\(Tensor\).*return a dict"):
        fitted(Net(nn.Linear(6, 3)), batches(6), EvolutionStrategy(population_size=4, objective="acc"))


# --- faults of the fitness -------------------------------------------------------------------------------------------


class Faulty(Net):
    """A fitness that is NaN, infinite or constant in some batches."""

    def __init__(self, fault: str, every: int = 1) -> None:
        super().__init__(nn.Linear(6, 3), lr=0.5)
        self.fault, self.every = fault, every

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        if index % self.every:
            return loss
        if self.fault == "constant":
            return loss * 0 + 1
        moved = (self.net.bias[0] > self.center).float()  # of about half the members
        return loss + torch.where(moved > 0, torch.tensor(float(self.fault)), 0.0)

    def on_train_start(self):
        self.center = self.net.bias[0].detach().clone() + 1e-6

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.5, weight_decay=0.1)


def test_nan_is_reported_and_the_step_is_no_step():
    module, rule = Faulty("nan"), EvolutionStrategy("snes", 8)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.warns(UserWarning, match=r"direction k=\d gave nan; batch 0 is skipped"):
        fitted(module, batches(6), rule)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert float(rule.algorithm.std.min()) == float(rule.algorithm.std.max())
    assert rule.record.skipped == 1
    with pytest.raises(RuntimeError, match="gave nan in batch 0"):
        fitted(Faulty("nan"), batches(6), EvolutionStrategy("snes", 8, on_nonfinite="raise"))


def test_a_constant_fitness_is_reported_and_the_step_is_no_step():
    module, rule = Faulty("constant"), EvolutionStrategy("snes", 8)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.warns(UserWarning, match="all 8 members have the fitness 1 in batch 0") as caught:
        fitted(module, batches(6, num=3), rule)
    assert len([w for w in caught if "all 8 members" in str(w.message)]) == 1
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert rule.record.skipped == 3
    assert torch.equal(rule.algorithm.std, torch.full((21,), 0.05))


def test_an_infinite_member_is_the_worst_where_ranks_count():
    module = Faulty("inf")
    fitted(module, batches(6), EvolutionStrategy("snes", 8))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    with pytest.warns(UserWarning, match="gave inf; batch 0 is skipped"):
        fitted(Faulty("inf"), batches(6), EvolutionStrategy(OpenAIES(shaping="raw"), 8))


def test_after_a_skipped_batch_the_search_goes_on():
    module, rule = Faulty("constant", every=2), EvolutionStrategy("snes", 8)
    with pytest.warns(UserWarning, match="all 8 members"):
        fitted(module, batches(6, num=4), rule)
    assert len(module.gradients[1]) == 2
    assert rule.record.skipped == 2


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SNES, SepCMAES, PGPE, DES])
def test_deviations_step_once_an_optimizer_step(kind):
    one, rule = Net(nn.Linear(6, 3)), EvolutionStrategy(kind(0.1), 8)
    fitted(one, batches(6, num=4), rule, accumulate_grad_batches=2)
    assert rule.algorithm._steps == 2
    assert rule.std()["net.weight"].shape == (3, 6)
    assert float(rule.std()["net.weight"].std()) > 0


def test_masks_restrict_the_search():
    torch.manual_seed(0)
    module, rule = Net(nn.Linear(6, 3), lr=1.0), EvolutionStrategy("snes", 8)
    mask = torch.rand(3, 6) > 0.5
    module.net.weight.data *= mask
    rule.restrict({"net.weight": mask})
    fitted(module, batches(6, num=3), rule)
    assert not module.net.weight[~mask].any()
    assert rule.algorithm.std.numel() == int(mask.sum()) + 3
    std = rule.std()
    assert not std["net.weight"][~mask].any()
    assert std["net.weight"][mask].gt(0).all()
    rule.restart()
    assert float(rule.algorithm.std) == 0.05
    with pytest.raises(ValueError, match="rank with masks"):
        EvolutionStrategy(population_size=8, rank=1).restrict({"net.weight": mask})
    assert EvolutionStrategy(population_size=8).std() is None


def test_no_member_is_left_in_the_module():
    torch.manual_seed(0)
    module = Problem(lr=0.0)
    before = {name: p.clone() for name, p in module.named_parameters()}
    fitted(module, loader(), EvolutionStrategy("snes", 8, rank=None))
    fitted(module, loader(), EvolutionStrategy(OpenAIES(), 8, rank=1))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert all("forward" not in part.__dict__ for part in module.modules())


def test_the_state_is_the_rules_own():
    snes = SNES(0.1)
    rule = EvolutionStrategy(snes, 8)
    fitted(Net(nn.Linear(6, 3)), batches(6), rule)
    assert snes.steps == 0
    assert rule.algorithm.steps == 1


def test_a_second_fit_begins_anew_and_says_so(caplog):
    rule = EvolutionStrategy("snes", 8)
    fitted(Net(nn.Linear(6, 3)), batches(6), rule)
    with caplog.at_level(logging.INFO):
        fitted(Net(nn.Linear(6, 3)), batches(6), rule)
    assert "EvolutionStrategy starts over" in caplog.text
    assert rule.algorithm.steps == 1
    fitted(Net(nn.Linear(6, 2)), batches(6, classes=2), rule)  # another module: other parameters


def test_resuming_a_search_of_another_kind_is_said():
    first = EvolutionStrategy("snes", 8)
    fitted(Net(nn.Linear(6, 3)), batches(6), first)
    state = first.state_dict()
    for other in ("sep_cma_es", "openai_es", "pgpe"):
        rule = EvolutionStrategy(other, 8)
        with pytest.warns(UserWarning, match=r"was searched by SNES; \w+ begins a search of its own"):
            rule.load_state_dict(state)
        assert rule.algorithm.steps == 0
        with pytest.raises(MisconfigurationException, match="resume with SNES"):
            EvolutionStrategy(other, 8, strict_rule=True).load_state_dict(state)


def test_masks_do_not_outlive_the_fit_with_a_ticket(tmp_path):
    from lightning_bpfree import LotteryTicket

    rule = EvolutionStrategy("snes", 8)
    for name in "ab":  # the second begins dense and afresh
        tickets = LotteryTicket("snr", 2, 0.5, dirpath=tmp_path / name)
        fitted(Net(nn.Linear(6, 3)), batches(6), rule, tickets, max_epochs=2)
        assert rule.masks is None
        assert rule.std()["net.weight"].count_nonzero() == 9  # what the last level searched
    module = Net(nn.Linear(6, 3), lr=1.0)
    before = module.net.weight.detach().clone()
    fitted(module, batches(6, num=3), rule)
    assert module.net.weight.ne(before).all()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population_size": 9}, r"population_size=9 is odd.*give 10, or mirrored=False"),
        ({"algorithm": "snes", "population_size": 9, "mirrored": True}, "population_size=9 is odd"),
        ({"population_size": 0}, "population_size=0"),
        ({"algorithm": "cma"}, "algorithm='cma': give 'openai_es'"),
        ({"algorithm": "snes", "rank": 1}, "rank with SNES.*Use OpenAIES"),
        ({"rank": 0}, "rank=0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"noise": "pink"}, "noise='pink'"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": "all"}, "chunk_size='all'"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        EvolutionStrategy(**settings)


def test_a_sigma_below_rounding_is_refused():
    with pytest.raises(MisconfigurationException, match=r"sigma=1e-07 is lost in the rounding of torch\.float32"):
        fitted(Net(nn.Linear(6, 3)), batches(6), EvolutionStrategy(SNES(1e-7), 8))
