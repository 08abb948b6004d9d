"""Resumes of a LotteryTicket within and between levels are exact."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import resume_worker
import torch
from conformance import assert_equal, state
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lottery_problems import Search, fit, plain
from problems import Problem, Tied, fitted, loader

from lightning_bpfree import Backprop, EvolutionStrategy, ForwardGradient, LotteryTicket, ZerothOrder

# --- resume ----------------------------------------------------------------------------------------------------------


def resumable(folder, epochs: int, make_rule, ckpt_path=None, validate: bool = False, **arguments):
    """Three levels of two epochs; checkpoints of every epoch. Returns module, callback, Trainer."""
    torch.manual_seed(3)
    module = Problem(Tied(dropout=0.3), optimizer="adamw", lr=0.01)
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
    data = loader(shuffle=True)
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
    with pytest.raises(MisconfigurationException, match=r"epochs_per_level=1.*saved with 2"):
        fit(tmp_path, tickets, others, ckpt_path=checkpoint, enable_checkpointing=True)
    path = tmp_path / "without.ckpt"
    fitted(plain(), loader(), max_epochs=2).save_checkpoint(path)
    with pytest.raises(MisconfigurationException, match=r"epoch 2 without a state of LotteryTicket.*init_from="):
        fit(tmp_path / "new", LotteryTicket("magnitude", levels=6), ckpt_path=path)


# --- with the search itself ------------------------------------------------------------------------------------------


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


def test_resuming_with_other_arguments_is_refused(tmp_path):
    first = LotteryTicket("magnitude", 3, 0.5)
    fit(tmp_path, first)
    state = first.state_dict()
    for other, said in (
        (LotteryTicket("snip", 3, 0.5), r"score=snip.*saved with score=magnitude"),
        (LotteryTicket("magnitude", 3, 0.6), r"sparsities=\[0\.0, 0\.4"),
        (LotteryTicket("magnitude", 3, 0.5, params="net.head.*"), r"params=net\.head"),
    ):
        with pytest.raises(MisconfigurationException, match=said):
            other.load_state_dict(first.state_dict())
    LotteryTicket("magnitude", 5, 0.5).load_state_dict(state)  # more levels behind them
