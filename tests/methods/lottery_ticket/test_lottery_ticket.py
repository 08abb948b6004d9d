"""Levels within one fit: exact masks, exact rewinds, exact zeros, exact resumes, and every baseline."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import resume_worker
import torch
from conformance import assert_equal, state
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from lightning.pytorch.loggers import CSVLogger
from problems import Problem, Tied, fitted, loader
from torch import nn

from lightning_bpfree import Backprop, EvolutionStrategy, ForwardForward, ForwardGradient, LotteryTicket, ZerothOrder
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.methods.lottery_ticket.masks import Masks, Restricts
from lightning_bpfree.methods.lottery_ticket.pruning import top_masks

WEIGHTS = ["net.inner.weight", "net.head.weight"]  # of `Tied`: 36 + 18; frozen and one-dimensional ones are left


class Search(ZerothOrder):
    """Stands in for an evolution strategy with a deviation for every weight; what it has learned is its steps."""

    def __init__(self, scalar: bool = False, floor: bool = False, **settings) -> None:
        super().__init__(**settings)
        self.scalar, self.floor = scalar, floor
        self.calls: list[str] = []
        self.masks: Masks | None = None
        self.searched: Masks | None = None
        self.steps = 0

    def estimate(self, step):
        self.steps += 1
        return super().estimate(step)

    def restrict(self, masks: Masks | None) -> None:
        self.calls.append("restrict")
        self.masks = masks
        self.searched = self.searched if masks is None else masks

    def restart(self) -> None:
        self.calls.append("restart")
        self.steps = 0

    def std(self):
        self.calls.append("std")
        if self.scalar:
            return None
        generator = torch.Generator().manual_seed(self.steps)
        std = {}
        for slot in self._module_state.slots.trainable():
            drawn = torch.rand(slot.parameter.shape, generator=generator) + 0.1
            std[slot.name] = drawn.clamp_min(0.9) if self.floor else drawn
            if self.masks is not None and slot.name in self.masks:
                std[slot.name][~self.masks[slot.name]] = 0.0
        return std

    def rule_state(self):
        return {"steps": self.steps}

    def load_rule_state(self, state) -> None:
        self.steps = state["steps"]


class Watch(pl.Callback):
    """Copies what a level starts with, and looks for pruned weights that have moved."""

    def __init__(self, tickets: LotteryTicket) -> None:
        self.tickets = tickets
        self.starts: list[dict[str, torch.Tensor]] = []
        self.masks: list[Masks | None] = []
        self.optimizer_states: list[int] = []
        self.rates: list[float] = []
        self.checked = self.steps = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.current_epoch % self.tickets.plan.epochs_per_level == 0 and batch_idx == 0:
            self.starts.append(
                {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
            )
            self.masks.append(self.tickets.masks)
            self.steps = trainer.global_step
            self.optimizer_states.append(len(trainer.optimizers[0].state))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *args) -> None:
        if self.tickets.masks is None:
            return
        named = {slot.name: slot.parameter for slot in ParameterSlots(module)}
        for name, mask in self.tickets.masks.items():
            assert torch.equal(named[name][~mask], torch.zeros(int((~mask).sum())))
        moved = [not torch.equal(named[n][mask], self.starts[-1][n][mask]) for n, mask in self.tickets.masks.items()]
        assert any(moved) == (trainer.global_step > self.steps), "the survivors train"
        self.checked += 1


def plain(**settings) -> Problem:
    torch.manual_seed(0)
    return Problem(Tied(dropout=0.0), **settings)


def wide() -> Problem:
    torch.manual_seed(0)
    return Problem(nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)))


def fit(folder, tickets: LotteryTicket, *callbacks, module=None, data=None, **settings):
    """Fit for as many epochs as the levels take; returns module and Trainer."""
    module = plain() if module is None else module
    epochs = tickets.plan.levels * tickets.plan.epochs_per_level
    settings = {"max_epochs": epochs, "default_root_dir": folder, **settings}
    return module, fitted(module, loader() if data is None else data, tickets, *callbacks, **settings)


def initial(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}


# --- levels -------------------------------------------------------------------------------------------------------


def test_twenty_levels_are_nested_and_exact_and_leave_biases_alone(tmp_path):
    module = wide()
    tickets = LotteryTicket("magnitude", levels=20, scope="layer")
    watch = Watch(tickets)
    before = initial(module)
    fit(tmp_path, tickets, watch, module=module, data=loader(rows=16))
    for level, (masks, start, result) in enumerate(zip(watch.masks, watch.starts, tickets.results, strict=True)):
        for name, value in start.items():
            survivors = masks[name] if masks is not None and name in masks else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value, torch.where(survivors, before[name], 0.0))
        if masks is not None:
            sizes = {n: p.numel() for n, p in module.named_parameters() if p.dim() > 1}
            assert masks.counts == {n: round(size * (1 - (1 - 0.8**level))) for n, size in sizes.items()}
            assert result["kept"] == masks.kept
        if level > 1:
            assert not any((masks[n] & ~watch.masks[level - 1][n]).any() for n in masks)


def test_a_rewind_is_bit_for_bit_buffers_included(tmp_path):
    module = plain(optimizer="adamw")
    before = initial(module)
    tickets = LotteryTicket("magnitude", levels=3, keep=0.5, epochs_per_level=2)
    watch = Watch(tickets)
    fit(tmp_path, tickets, watch, module=module)
    assert len(watch.starts) == 3
    assert int(module.net.norm.num_batches_tracked) == 8  # the last level's own
    for masks, start in zip(watch.masks, watch.starts, strict=True):
        kept = {} if masks is None else masks
        assert_equal(start, {n: torch.where(kept[n], t, 0.0) if n in kept else t for n, t in before.items()})
    assert [masks and masks.kept for masks in watch.masks] == [None, 27, 14]
    assert list(watch.masks[1]) == WEIGHTS


class Noisy(torch.optim.SGD):
    """Moves every weight, whatever its gradient."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        return loss


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [("adamw", {}), ("sgd", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}), ("noisy", {})],
)
@pytest.mark.parametrize("rule", [None, ForwardGradient], ids=["plain", "forward_gradient"])
def test_pruned_weights_stay_exactly_zero(optimizer, settings, rule, tmp_path):
    module = plain(optimizer=optimizer)
    if optimizer == "noisy":
        module.configure_optimizers = lambda: Noisy(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    tickets = LotteryTicket("magnitude", levels=3, keep=0.5)
    watch = Watch(tickets)
    fit(tmp_path, tickets, watch, *([rule()] if rule else []), module=module, **settings)
    assert watch.checked == 8


def test_gradients_of_pruned_weights_reach_neither_clipping_nor_moments(tmp_path):
    module = plain(optimizer="adamw")
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5)
    _, trainer = fit(tmp_path, tickets, module=module)
    for name, gradient in module.gradients[-1].items():
        if name in tickets.masks:
            assert not gradient[~tickets.masks[name]].any()
            assert gradient[tickets.masks[name]].any()
    named = dict(module.named_parameters())
    for name, mask in tickets.masks.items():
        assert not trainer.optimizers[0].state[named[name]]["exp_avg_sq"][~mask].any()


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_optimizers_and_schedules_begin_anew(interval, tmp_path):
    module = plain()

    def configure():
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    module.configure_optimizers = configure
    tickets = LotteryTicket("magnitude", levels=3, keep=0.5, epochs_per_level=2)
    watch = Watch(tickets)
    fit(tmp_path, tickets, watch, module=module)
    assert watch.optimizer_states == [0, 0, 0]
    one = [0.1 * 0.5 ** (batch if interval == "step" else batch // 4) for batch in range(8)]
    assert watch.rates == pytest.approx(one * 3)


def test_the_last_level_stays_trained_and_trains_on(tmp_path):
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5)
    module, _ = fit(tmp_path, tickets, max_epochs=4)
    ticket = tickets.tickets[-1]
    assert ticket.level == tickets.level == 1
    assert_equal(ticket.mean, dict(module.named_parameters()))
    assert int(module.net.norm.num_batches_tracked) == 12
    assert ticket.info["epochs_trained"] == 3


def test_tickets_and_results(tmp_path):
    torch.manual_seed(0)
    module = plain()
    before = initial(module)
    tickets = LotteryTicket("magnitude", levels=3, keep=0.5, dirpath=tmp_path / "here", seed=5)
    fit(tmp_path, tickets, Backprop(), module=module)
    assert [p.name for p in sorted((tmp_path / "here").iterdir())] == [f"level_0{i}.pt" for i in range(3)]
    assert [r["kept"] for r in tickets.results] == [54, 27, 14]
    for level, (ticket, result) in enumerate(zip(tickets.tickets, tickets.results, strict=True)):
        assert ticket.level == result["level"] == level
        assert ticket.masks.kept == result["kept"]
        assert result["weights_left"] == result["kept"] / 54
        assert result["metrics"]["train_loss"] == ticket.metrics["train_loss"] > 0
        assert result["metrics"]["bpfree/ticket/level"] == level
        assert result["metrics"]["bpfree/ticket/weights_left"] == pytest.approx(result["weights_left"])
        assert_equal({**ticket.init, **ticket.buffers}, before)
        assert int(ticket.mean_buffers["net.norm.num_batches_tracked"]) == 4
        assert (ticket.info["rule"], ticket.info["score"], ticket.info["seed"]) == ("Backprop", "magnitude", 5)
        assert ticket.std is None
    losses = [r["metrics"]["train_loss"] for r in tickets.results]
    assert len(set(losses)) == 3
    other = plain()
    tickets.tickets[2].apply_to(other, "mean")
    assert_equal(dict(other.named_parameters()), dict(module.named_parameters()))


def test_loggers_hold_rule_and_ticket(tmp_path):
    for order in (0, 1):
        logger = CSVLogger(tmp_path / str(order), version="")
        tickets = LotteryTicket("magnitude", levels=1, exclude="net.head.*")
        both = [tickets, ForwardGradient(2)]
        fitted(
            plain(), loader(), *(both[::-1] if order else both), logger=logger, default_root_dir=tmp_path / str(order)
        )
        text = (Path(logger.log_dir) / "hparams.yaml").read_text()
        assert "rule: ForwardGradient" in text
        assert "num_directions: 2" in text
        assert "score: magnitude" in text
        assert "exclude: net.head.*" in text


# --- resume -------------------------------------------------------------------------------------------------------


def resumable(folder, epochs: int, make_rule, ckpt_path=None, validate: bool = False, **arguments):
    """Three levels of two epochs; checkpoints of every epoch. Returns module, callback, Trainer."""
    torch.manual_seed(3)
    module = Problem(Tied(dropout=0.3 if make_rule else 0.0), optimizer="adamw", lr=0.01)
    if validate:
        module.validation_step = lambda batch, batch_idx: module.log("val", module.net(batch[0]).mean())
    tickets = LotteryTicket(
        **{
            **({} if "sparsities" in arguments else {"levels": 3, "keep": 0.6}),
            **{"epochs_per_level": 2, "score": "magnitude", "seed": 1, **arguments},
        }
    )
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
    callbacks = [tickets, checkpoints, *([make_rule()] if make_rule else [])]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, default_root_dir=folder, log_every_n_steps=1, num_sanity_val_steps=0,
    )  # fmt: skip
    data = loader(shuffle=make_rule is not None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # on purpose
        trainer.fit(module, data, loader(seed=9) if validate else None, ckpt_path=ckpt_path)
    return module, tickets, trainer


def assert_same_run(one, other) -> None:
    (module, tickets, trainer), (module_2, tickets_2, trainer_2) = one, other
    assert_equal(state(module), state(module_2))
    assert tickets.masks == tickets_2.masks
    assert tickets.results == tickets_2.results
    a, b = (t.optimizers[0].state_dict()["state"] for t in (trainer, trainer_2))
    assert a.keys() == b.keys()
    for key in a:
        assert_equal({k: torch.as_tensor(v) for k, v in a[key].items()}, b[key])


CASES = {
    "plain": (None, {}),
    "plain_validated": (None, {"validate": True}),
    "backprop": (Backprop, {"weights": "fresh"}),
    "random_reinit": (ForwardGradient, {"score": "random", "weights": "fresh"}),
    "permuted": (ForwardGradient, {"weights": "permuted", "permute_masks": True}),
    "snip": (Backprop, {"score": "snip", "sparsities": [0.2, 0.4, 0.6]}),
    "snr": (Search, {"score": "snr"}),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_within_a_level_and_between_levels_is_exact(case, tmp_path):
    make_rule, arguments = CASES[case]
    whole = resumable(tmp_path / "whole", 6, make_rule, **arguments)
    for epoch in (2, 3):  # within the second level, and behind it
        torch.manual_seed(99)  # the resumed process starts from another random state
        checkpoint = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        saved = torch.load(checkpoint, weights_only=True)["callbacks"]["LotteryTicket"]
        assert saved["level"] == 1
        again = resumable(tmp_path / str(epoch), 6, make_rule, ckpt_path=checkpoint, **arguments)
        assert_same_run(whole, again)


def test_resume_within_an_epoch_and_behind_its_last_batch(tmp_path):
    def part(folder, ckpt_path=None):
        torch.manual_seed(5)
        tickets = LotteryTicket("magnitude", levels=3, keep=0.6)
        checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        torch.manual_seed(5)
        rule = ZerothOrder(2)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[rule, tickets, checkpoints], default_root_dir=folder,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The dirpath has changed")
            trainer.fit(resume_worker.Net(), resume_worker.Batches(), ckpt_path=ckpt_path)
        return trainer.lightning_module, tickets, trainer

    whole = part(tmp_path / "whole")
    for step in (10, 14):  # 7 batches an epoch
        again = part(tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt")
        for run in (whole, again):
            for result in run[1].results:
                result.pop("metrics", None)  # Lightning does not repeat the end of an epoch that it has saved before
        assert_same_run(whole, again)


def test_pruned_weights_are_zero_in_checkpoints_and_after_reload(tmp_path):
    _, tickets, _ = resumable(tmp_path, 6, None)
    saved = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    for name, mask in tickets.masks.items():
        assert torch.equal(saved["state_dict"][name][~mask], torch.zeros(int((~mask).sum())))
    torch.manual_seed(1)
    again = Problem()
    again.load_state_dict(saved["state_dict"])
    assert_equal(again.state_dict(), saved["state_dict"])


def test_what_a_resume_refuses(tmp_path):
    resumable(tmp_path, 6, None)
    checkpoint = tmp_path / "epoch=2.ckpt"
    tickets = LotteryTicket("magnitude", levels=6)
    others = ModelCheckpoint(tmp_path / "other")
    with pytest.raises(MisconfigurationException, match=r"epochs_per_level=1.*made with 2"):
        fit(tmp_path, tickets, others, ckpt_path=checkpoint, enable_checkpointing=True)
    path = tmp_path / "without.ckpt"
    fitted(plain(), loader(), max_epochs=2).save_checkpoint(path)
    with pytest.raises(MisconfigurationException, match=r"epoch 2 without a state of LotteryTicket.*init_from="):
        fit(tmp_path / "new", LotteryTicket("magnitude", levels=6), ckpt_path=path)


# --- baselines ----------------------------------------------------------------------------------------------------


def levels_of(folder, *callbacks, module=None, **arguments):
    tickets = LotteryTicket(**{"levels": 3, "keep": 0.6, "seed": 4, **arguments})
    watch = Watch(tickets)
    module = wide() if module is None else module
    before = initial(module)
    fit(folder, tickets, *callbacks, watch, module=module)
    return before, watch, tickets


def nested(watch: Watch) -> bool:
    pairs = zip(watch.masks[1:], watch.masks[2:], strict=False)
    return not any((new[n] & ~old[n]).any() for old, new in pairs for n in new)


def test_magnitude_keeps_the_largest_trained_weights(tmp_path):
    _, _, tickets = levels_of(tmp_path, score="magnitude")
    for ticket, following in zip(tickets.tickets, tickets.tickets[1:], strict=False):
        scores = {n: ticket.mean[n].abs() for n in ticket.masks}
        assert following.masks == top_masks(scores, following.info["sparsity"], ticket.masks)


def test_random_reinit_redraws_masks_and_weights(tmp_path):
    before, watch, tickets = levels_of(tmp_path, score="random", weights="fresh")
    assert not nested(watch)
    assert [r["kept"] for r in tickets.results] == [1312, 787, 472]
    first, second, third = watch.starts
    assert_equal(first, before)
    for name in ("net.0.bias", "net.2.weight"):
        assert not torch.equal(second[name], first[name])
        assert not torch.equal(third[name], second[name])
    # torch's own initialisation of the first layer is uniform within 1/sqrt(6)
    assert 0.35 < float(second["net.0.weight"].abs().max()) <= 6**-0.5
    _, again, _ = levels_of(tmp_path / "again", score="random", weights="fresh")
    assert_equal(again.starts[2], third)
    _, other, _ = levels_of(tmp_path / "other", score="random", weights="fresh", seed=5)
    assert other.masks[2] != watch.masks[2]


def test_random_masks_of_rewound_weights_are_nested(tmp_path):
    before, watch, _ = levels_of(tmp_path, score="random")
    assert nested(watch)
    assert torch.equal(watch.starts[2]["net.2.weight"], before["net.2.weight"] * watch.masks[2]["net.2.weight"])


def test_mask_reinit_has_the_masks_of_magnitude_and_fresh_weights(tmp_path):
    before, watch, _ = levels_of(tmp_path, score="magnitude", weights="fresh")
    _, magnitude, _ = levels_of(tmp_path / "m", score="magnitude")
    assert watch.masks[1] == magnitude.masks[1]
    assert nested(watch)
    kept = watch.masks[1]["net.2.weight"]
    assert not (watch.starts[1]["net.2.weight"] == before["net.2.weight"])[kept].any()


@pytest.mark.parametrize("permute_masks", [False, True])
def test_permuted_weights_are_those_of_the_first_initialisation_in_another_order(permute_masks, tmp_path):
    before, watch, tickets = levels_of(
        tmp_path, score="magnitude", weights="permuted", permute_masks=permute_masks, scope="layer"
    )
    assert nested(watch) != permute_masks
    for masks, start in zip(watch.masks[1:], watch.starts[1:], strict=True):
        for name, mask in masks.items():
            assert torch.equal(start[name][mask].sort().values, before[name][mask].sort().values)
            assert not torch.equal(start[name][mask], before[name][mask])
            assert not start[name][~mask].any()
        assert torch.equal(start["net.0.bias"], before["net.0.bias"])
    assert [r["kept"] for r in tickets.results] == [1312, 787, 473]  # rounded layer by layer


def test_snip_equals_a_computation_by_hand_and_leaves_no_trace(tmp_path):
    module = wide()
    data = loader(shuffle=True)
    total = {n: torch.zeros_like(p) for n, p in module.named_parameters() if p.dim() > 1}
    batches = list(loader())
    for x, y in batches:
        loss = nn.functional.cross_entropy(module.net(x), y)
        gradients = torch.autograd.grad(loss, [dict(module.named_parameters())[n] for n in total])
        total = {n: t + g / len(batches) for (n, t), g in zip(total.items(), gradients, strict=True)}
    params = dict(module.named_parameters())
    scores = {n: (params[n] * g).abs().detach() for n, g in total.items()}
    tickets = LotteryTicket("snip", sparsities=[0.3, 0.6])
    torch.manual_seed(1)
    fit(tmp_path, tickets, module=module, data=data)
    for ticket, sparsity in zip(tickets.tickets, (0.3, 0.6), strict=True):
        expected = top_masks(scores, sparsity)
        # Batches come in another order, so that sums, and with them a pair at the threshold, may differ.
        assert sum(int((expected[n] != ticket.masks[n]).sum()) for n in expected) <= 2


@pytest.mark.parametrize("make_rule", [None, ZerothOrder, ForwardGradient, ForwardForward])
def test_scoring_by_snip_changes_nothing_else(make_rule, tmp_path):
    runs = {}
    for score in ("snip", "magnitude"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))
        module = Problem(net if make_rule is not ForwardForward else nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
        rule = (
            [] if make_rule is None else [make_rule(label="embedding") if make_rule is ForwardForward else make_rule()]
        )
        generator = torch.Generator().manual_seed(2)
        data = torch.utils.data.DataLoader(loader().dataset, batch_size=16, shuffle=True, generator=generator)
        tickets = LotteryTicket(score, levels=2, keep=0.9, epochs_per_level=2)
        seen = {}

        class Sees(pl.Callback):
            def on_train_epoch_end(self, trainer, module, seen=seen) -> None:
                if trainer.current_epoch == 1:
                    seen.update(state(module), rng=torch.get_rng_state())
                    logged = {n: v for n, v in trainer.callback_metrics.items() if n != "bpfree/forward_evals"}
                    seen.update({n: torch.as_tensor(v) for n, v in logged.items()})

        fit(tmp_path / score, tickets, *rule, Sees(), module=module, data=data)
        runs[score] = seen
    assert_equal(runs["snip"], runs["magnitude"])


def test_snip_does_not_take_the_workers_of_the_first_epoch(tmp_path):
    module = plain()
    data = torch.utils.data.DataLoader(loader().dataset, batch_size=16, num_workers=1, persistent_workers=True)
    fit(tmp_path, LotteryTicket("snip", levels=2, epochs_per_level=1), module=module, data=data)
    assert len(module.gradients) == 8  # four batches in each of two epochs


def test_snip_needs_a_differentiable_loss(tmp_path):
    class Flat(Problem):
        def training_step(self, batch, index):
            return float(super().training_step(batch, index).detach())

    with pytest.raises(MisconfigurationException, match=r"no graph.*score='magnitude'"):
        fit(tmp_path, LotteryTicket("snip", levels=2), ZerothOrder(), module=Flat())
    data = torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=4)
    with pytest.raises(MisconfigurationException, match="automatic_optimization=False"):
        fit(tmp_path, LotteryTicket("snip", levels=2), module=ManualOptimBoringModel(), data=data)


def test_manual_optimization_is_pruned_too(tmp_path):
    data = torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=4)
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5)
    module, _ = fit(tmp_path, tickets, module=ManualOptimBoringModel(), data=data)
    assert int((module.layer.weight == 0).sum()) == 32


# --- signal to noise ----------------------------------------------------------------------------------------------


def test_a_search_is_restricted_restarted_and_asked(tmp_path):
    rule = Search()
    assert isinstance(rule, Restricts)
    assert not isinstance(ZerothOrder(), Restricts)
    tickets = LotteryTicket("snr", levels=3, keep=0.6)
    fit(tmp_path, tickets, rule)
    level = ["std", "restrict", "restart"]
    # Twice at first, to see that it can search under masks; then the look after one batch; at the end it is free.
    assert rule.calls == ["restrict", "restrict", "restart", "std", *level, *level, "std", "restrict"]
    assert rule.searched is tickets.masks
    assert rule.masks is None
    for ticket, following in zip(tickets.tickets, tickets.tickets[1:], strict=False):
        scores = {n: ticket.mean[n].abs() / ticket.std[n] for n in ticket.masks}
        assert following.masks == top_masks(scores, following.info["sparsity"], ticket.masks)
        assert following.masks != top_masks({n: ticket.mean[n].abs() for n in scores}, following.info["sparsity"])


def test_a_search_is_restricted_under_any_score(tmp_path):
    rule = Search(scalar=True)
    tickets = LotteryTicket("magnitude", levels=2)
    fit(tmp_path, tickets, rule)
    assert rule.searched is tickets.masks
    assert tickets.tickets[0].std is None


def test_no_deviations_no_ratio(tmp_path):
    for rule, named in ((None, "plain backprop"), (ForwardGradient(), "ForwardGradient")):
        with pytest.raises(MisconfigurationException, match=rf"{named} has none.*score='magnitude'.*SNES"):
            fit(tmp_path, LotteryTicket(levels=2), *([rule] if rule else []))
    module = plain()
    with pytest.raises(MisconfigurationException, match=r"one deviation for all weights.*magnitude.*SNES"):
        fit(tmp_path, LotteryTicket(levels=2), Search(scalar=True), module=module)
    assert module.evaluations <= 3  # said after the first batch (three forwards), not after a level

    class Partly(Search):
        def std(self):
            return {"net.head.weight": torch.ones(3, 6)}

    with pytest.raises(MisconfigurationException, match=r"no deviation of net\.inner\.weight.*exclude="):
        fit(tmp_path, LotteryTicket(levels=2), Partly())
    fit(tmp_path, LotteryTicket(levels=1), ForwardGradient())  # nothing is scored


def test_deviations_on_a_floor_are_said(tmp_path):
    with pytest.warns(UserWarning, match=r"7\d% of the deviations are 0\.9.*magnitude"):
        fit(tmp_path, LotteryTicket(levels=2), Search(floor=True))


# --- which weights ------------------------------------------------------------------------------------------------


def test_params_exclude_and_the_rules_own_choice(tmp_path):
    for i, (arguments, rule, names) in enumerate(
        [
            ({}, [], WEIGHTS),
            ({"params": "net.head.*"}, [], WEIGHTS[1:]),
            ({"exclude": ["net.head.*"]}, [], WEIGHTS[:1]),
            ({}, [ForwardGradient(params="net.head.*")], WEIGHTS[1:]),
        ]
    ):
        tickets = LotteryTicket("magnitude", levels=2, keep=0.5, **arguments)
        fit(tmp_path / str(i), tickets, *rule)
        assert list(tickets.masks) == names


def test_fresh_weights_come_from_the_modules_own_method_and_spare_frozen_ones(tmp_path):
    class Own(Problem):
        def reset_parameters(self):
            for parameter in self.parameters():
                nn.init.constant_(parameter, float(torch.rand(())))

    torch.manual_seed(0)
    module = Own(Tied(dropout=0.0))
    before = initial(module)
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5, weights="fresh")
    watch = Watch(tickets)
    streams = []

    class Streams(pl.Callback):
        def on_train_epoch_start(self, trainer, module) -> None:
            streams.append(torch.get_rng_state())

    fit(tmp_path / "fresh", tickets, watch, Streams(), module=module)
    fit(tmp_path, LotteryTicket("magnitude", levels=2), Streams())
    assert torch.equal(streams[1], streams[3])
    start = watch.starts[1]
    assert torch.equal(start["net.frozen.weight"], before["net.frozen.weight"])
    assert start["net.head.bias"].unique().numel() == 1
    assert not torch.equal(start["net.head.bias"], before["net.head.bias"])
    assert torch.equal(start["net.norm.running_mean"], torch.zeros(6))


def test_what_cannot_be_made_fresh_is_named(tmp_path):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return x @ self.matrix

    with pytest.raises(MisconfigurationException, match=r"net\.1: has parameters.*Give Problem a reset_parameters"):
        fit(
            tmp_path,
            LotteryTicket("random", levels=2, weights="fresh"),
            module=Problem(nn.Sequential(nn.Linear(6, 6), Bare())),
        )

    class Replaces(Problem):
        def reset_parameters(self):
            self.net[0].weight = nn.Parameter(torch.randn(6, 6))

    module = Replaces(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    with pytest.raises(MisconfigurationException, match=r"other tensors in the place of net\.0\.weight"):
        fit(tmp_path, LotteryTicket("magnitude", levels=2, keep=0.5, weights="fresh"), module=module)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)

    class Attends(Problem):
        def training_step(self, batch, index):
            return self.net(batch[0][None], batch[0][None], batch[0][None])[0].square().mean()

    fit(tmp_path / "new", LotteryTicket("magnitude", levels=2, keep=0.5, weights="fresh"), module=Attends(attention))


# --- from a ticket ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [False, True])
def test_training_from_a_ticket(as_file, tmp_path):
    source = LotteryTicket("magnitude", levels=2, keep=0.5)
    fit(tmp_path / "source", source)
    ticket = source.tickets[1]
    given = str(tmp_path / "source" / "tickets" / "level_01.pt") if as_file else ticket
    torch.manual_seed(77)
    module = Problem(Tied(dropout=0.0))
    target = LotteryTicket("magnitude", levels=2, keep=0.5, init_from=given)
    watch = Watch(target)
    fit(tmp_path / "target", target, watch, ForwardGradient(), module=module)
    first, second = watch.starts
    assert watch.masks[0] == ticket.masks
    for name, value in {**ticket.init, **ticket.buffers}.items():
        assert torch.equal(first[name], value * ticket.masks[name] if name in ticket.masks else value)
    assert [r["kept"] for r in target.results] == [27, 14]  # the plan goes on from the ticket's sparsity
    assert torch.equal(second["net.head.weight"], ticket.init["net.head.weight"] * watch.masks[1]["net.head.weight"])
    assert not (watch.masks[1]["net.head.weight"] & ~ticket.masks["net.head.weight"]).any()


def test_a_ticket_alone_with_other_weights_or_pruned_further(tmp_path):
    source = LotteryTicket("magnitude", levels=2, keep=0.5)
    fit(tmp_path / "source", source)
    ticket = source.tickets[1]
    runs = {}
    for weights in ("init", "fresh", "permuted"):
        target = LotteryTicket("magnitude", levels=1, init_from=ticket, weights=weights)
        watch = Watch(target)
        fit(tmp_path / weights, target, watch)
        assert watch.masks == [ticket.masks]
        runs[weights] = watch.starts[0]["net.inner.weight"]
        assert not runs[weights][~ticket.masks["net.inner.weight"]].any()
    assert not torch.equal(runs["fresh"], runs["init"])
    assert torch.equal(runs["permuted"].flatten().sort().values, runs["init"].flatten().sort().values)
    further = LotteryTicket("snip", sparsities=[0.75], init_from=ticket)
    fit(tmp_path / "further", further)
    assert further.masks.kept == 14
    assert not any((further.masks[n] & ~ticket.masks[n]).any() for n in ticket.masks)


def test_a_ticket_that_does_not_go_with_the_arguments(tmp_path):
    source = LotteryTicket("magnitude", levels=2, keep=0.5)
    fit(tmp_path, source)
    ticket = source.tickets[1]
    with pytest.raises(ValueError, match=r"sparsities=\[0\.2, 0\.7\].*0\.5 of its weights.*none come back"):
        fit(tmp_path / "a", LotteryTicket("magnitude", sparsities=[0.2, 0.7], init_from=ticket))
    with pytest.raises(ValueError, match=r"exclude='net\.head\.\*' select.*leave both out"):
        fit(tmp_path / "b", LotteryTicket("magnitude", levels=1, exclude="net.head.*", init_from=ticket))
    with pytest.raises(ValueError, match=r"net\.inner\.weight \(6, 6\) \| missing"):
        fit(tmp_path / "c", LotteryTicket("magnitude", levels=1, init_from=ticket), module=wide())
    with pytest.raises(ValueError, match="no weight has a deviation yet"):
        fit(tmp_path / "d", LotteryTicket("snr", sparsities=[0.7, 0.8], init_from=ticket), Search())


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "snrr"}, "score='snrr': choose 'snr'"),
        ({"scope": "all"}, "scope='all'"),
        ({"weights": "late"}, "weights='late'"),
        ({"levels": 0}, "levels=0"),
        ({"epochs_per_level": 1.5}, r"epochs_per_level=1\.5"),
        ({"keep": 1.0}, r"keep=1\.0.*\(0, 1\)"),
        ({"sparsities": []}, r"sparsities=\[\]"),
        ({"sparsities": [0.0, 1.0]}, r"\[0, 1\)"),
        ({"sparsities": [0.5, 0.2], "score": "magnitude"}, "none below the one before"),
        ({"sparsities": [0.5, 0.7]}, r"no weight has a deviation yet: begin with 0\.0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        LotteryTicket(**arguments)


def test_what_a_fit_refuses(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"4 levels of 2 epochs, 8 in all.*max_epochs=7.*max_epochs=8"):
        fit(tmp_path, LotteryTicket("magnitude", levels=4, epochs_per_level=2), max_epochs=7)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LotteryTicket`"):  # Lightning's
        fit(tmp_path, LotteryTicket("magnitude", levels=1), LotteryTicket("magnitude", levels=1))
    for argument in ("params", "exclude"):
        with pytest.raises(ValueError, match=rf"{argument}='net\.haed\.\*' matches none.*net\.head"):
            fit(tmp_path, LotteryTicket("magnitude", levels=1, **{argument: "net.haed.*"}))
    with pytest.raises(MisconfigurationException, match=r"params='\*\.bias'.*leaves nothing to prune.*no biases"):
        fit(tmp_path, LotteryTicket("magnitude", levels=1, params="*.bias"))
    lazy = Problem(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)))
    with pytest.raises(MisconfigurationException, match=r"net\.0\.weight.*have no shape"):
        fit(tmp_path, LotteryTicket("magnitude", levels=1, params="net.1.*"), module=lazy)


def test_a_layer_that_would_vanish_is_named_and_the_finished_level_kept(tmp_path):
    tickets = LotteryTicket("magnitude", sparsities=[0.0, 0.98])
    with pytest.raises(ValueError, match=r"level 1 of 2: sparsity=0\.98 would prune net\.\w+\.weight whole.*exclude="):
        fit(tmp_path, tickets)
    assert [ticket.level for ticket in tickets.tickets] == [0]


def test_an_earlier_run_is_not_written_over_in_silence(tmp_path):
    fit(tmp_path, LotteryTicket("magnitude", levels=1))
    with pytest.warns(UserWarning, match="holds tickets of an earlier run"):
        fit(tmp_path, LotteryTicket("magnitude", levels=1))


def test_one_batch_to_try(tmp_path):
    tickets = LotteryTicket("magnitude", levels=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, tickets, fast_dev_run=True)
    assert not (tmp_path / "tickets").exists()


def test_without_logging(tmp_path):
    class Silent(Problem):
        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    tickets = LotteryTicket("magnitude", levels=2, keep=0.5, dirpath=tmp_path)
    trainer = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=2, callbacks=[tickets])
    trainer.fit(Silent(), loader())
    assert [r["kept"] for r in tickets.results] == [54, 27]


def test_levels_are_told(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, LotteryTicket("magnitude", levels=2, keep=0.5), max_epochs=3)
    text = caplog.text
    assert "LotteryTicket needs 2 epochs; the last level trains on, to epoch 3." in text
    assert "LotteryTicket, level 0 of 2, all weights" in text
    assert "LotteryTicket, level 1 of 2, 27 of 54 weights left (50.00%): net.inner.weight" in text


def test_the_same_object_serves_several_fits(tmp_path):
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5)
    fit(tmp_path / "a", tickets)
    one = tickets.masks
    fit(tmp_path / "b", tickets)
    assert tickets.masks == one
    assert [r["level"] for r in tickets.results] == [0, 1]


# --- with the search itself ---------------------------------------------------------------------------------------


@pytest.mark.slow  # several trainings
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # on purpose
@pytest.mark.parametrize("algorithm", ["snes", "pgpe", "sep_cma_es", "des"])
def test_an_evolution_strategy_searches_the_survivors_and_resumes(tmp_path, algorithm):
    def part(folder, *callbacks, **settings):
        rule, tickets = EvolutionStrategy(algorithm, 8), LotteryTicket("snr", 3, 0.5, epochs_per_level=2)
        module, _ = fit(tmp_path / folder, tickets, rule, *callbacks, enable_checkpointing=True, **settings)
        return module, rule, tickets

    whole, rule, tickets = part("whole", ModelCheckpoint(tmp_path / "saved", "{epoch}", save_top_k=-1))
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    assert rule.algorithm.std.numel() == trained - (tickets.masks.total - tickets.masks.kept)
    for epoch in (1, 2):  # at the border of two levels, and inside one
        again, other, _ = part("again", ckpt_path=str(tmp_path / "saved" / f"epoch={epoch}.ckpt"))
        assert_equal(state(whole), state(again))
        assert torch.equal(rule.algorithm.std, other.algorithm.std)


def test_what_cannot_search_under_masks_is_refused_at_once(tmp_path):
    rule = EvolutionStrategy(population_size=8, rank=1)
    with pytest.raises(ValueError, match=r"rank with masks.*rank=None"):
        fit(tmp_path, LotteryTicket("magnitude", levels=2), rule)
    assert rule.record.batches == 0
    with pytest.raises(MisconfigurationException, match="score='magnitude'"):
        fit(tmp_path, LotteryTicket("snr", levels=2), EvolutionStrategy(population_size=8))


def test_resuming_with_other_arguments_is_refused(tmp_path):
    first = LotteryTicket("magnitude", 3, 0.5)
    fit(tmp_path, first)
    state = first.state_dict()
    for other, said in (
        (LotteryTicket("snip", 3, 0.5), r"score=snip.*made with score=magnitude"),
        (LotteryTicket("magnitude", 3, 0.6), r"sparsities=\[0\.0, 0\.4"),
        (LotteryTicket("magnitude", 3, 0.5, params="net.head.*"), r"params=net\.head"),
    ):
        with pytest.raises(MisconfigurationException, match=said):
            other.load_state_dict(first.state_dict())
    LotteryTicket("magnitude", 5, 0.5).load_state_dict(state)  # more levels behind them


def test_the_pass_for_snip_is_counted(tmp_path):
    rule = Backprop()
    fit(tmp_path, LotteryTicket("snip", 1, sparsities=[0.5]), rule)
    assert rule.record.forward_evals == 2 * 4 * 3.0  # four batches for the scores, and four of training
