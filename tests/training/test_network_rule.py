"""The base of rules inside a network carries rules of others: with blocks, own modules, another forward pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conformance import check_rule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, Tied, fitted, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules
from lightning_bpfree.core.forward_override import ForwardOverride
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.core.step import Estimate, Step
from lightning_bpfree.training.network_in_blocks import LOCAL_BACKWARD, NetworkInBlocks, recorded


class LocalCodes(bpf.NetworkRule):
    """Every block learns to be read by a linear decoder of its own, as target propagation's inverses do."""

    estimates_user_loss = False
    reevaluates = False

    def __init__(
        self, blocks: Any = 1, network: str | None = None, learning_rates: Any = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.blocks, self.network, self.learning_rates = blocks, network, learning_rates
        self.decoders = AuxiliaryModules("adam", 0.01)

    def auxiliary(self) -> Mapping[str, AuxiliaryModules]:
        return {"decoders": self.decoders}

    def start_over(self) -> None:
        self.decoders = AuxiliaryModules("adam", 0.01)

    def estimate(self, step: Step) -> Estimate:
        self.on_batch_settled(False)
        parts = NetworkInBlocks.of(type(self).__name__, step, self.found_network, self.parts.blocks)
        made: dict[str, Tensor] = {}

        def leave(j: int, z: Tensor) -> Tensor:
            key, flat = f"decoder/{j}", z.flatten(1)
            seed = mix(self.record.seed or 0, j)
            decoder = self.decoders.get(key, lambda: nn.Linear(flat.shape[1], flat.shape[1]), seed, z.device, z.dtype)
            with torch.autocast(z.device.type, enabled=False):
                loss = (decoder(flat).tanh() - flat.detach().roll(1, 1)).square().mean()
            own, slots = list(decoder.parameters()), parts.slots[j]
            found = torch.autograd.grad(loss, [*(slot.parameter for slot in slots), *own], allow_unused=True)
            for slot, gradient in zip(slots, found, strict=False):
                made[slot.name] = torch.zeros_like(slot.parameter) if gradient is None else gradient
            self.decoders.propose(key, found[len(slots) :])
            return z.detach()

        outside = recorded(parts, leave, graph=True, cost=1 + LOCAL_BACKWARD)
        assert step.recorded_loss is not None
        return Estimate(step.recorded_loss.detach(), {**outside.gradients, **made})


class Halved(ForwardOverride):
    """Half of what the network returns."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.training_pass is not None:
            self.training_pass.append(args)
        return self.original(*args, **kwargs) / 2


class Halving(bpf.NetworkRule):
    """Computes in the place of the forward pass, as equilibrium propagation and NoProp do."""

    blocks = 1

    def override(self, network: nn.Module, parts: Any) -> ForwardOverride:
        return Halved(network)

    def estimate(self, step: Step) -> Estimate:
        assert self._override is not None
        calls: list[Any] = []
        with self._override.in_training(calls):
            loss = step.loss()
        if not calls:
            raise self.never_called()
        return Estimate(loss)


def chain(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


# --- the properties of every rule, for rules that are not ours ---


def test_a_rule_with_blocks_and_modules_of_its_own():
    check_rule(
        LocalCodes,
        leave_out={
            "several_dataloaders": "its blocks run once a step",
            "accumulation_is_the_mean_of_micro_batches": "its decoders learn when the optimizer steps",
        },
    )


def test_a_rule_with_a_forward_pass_of_its_own():
    check_rule(
        Halving,
        leave_out={
            "logs_and_metrics_count_once": "half the scores are another loss",
        },
    )


# --- the network ---


def test_errors_name_the_rule():
    class Named(LocalCodes):
        pass

    class Skips(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[4](self[1](self[0](x)))

    with pytest.raises(MisconfigurationException, match=r"^Named: the training step does not run 2\.\.3"):
        fitted(Problem(Skips(*chain())), loader(), Named())
    with pytest.raises(MisconfigurationException, match=r"^Named: net\.norm.* belongs to no block"):
        fitted(Problem(Tied()), loader(), Named([["inner"], ["again"]]))
    compiled = Problem(chain())
    compiled.net[0] = torch.compile(compiled.net[0], backend="eager")
    with pytest.raises(MisconfigurationException, match=r"^Named works inside the network.*torch\.compile"):
        fitted(compiled, loader(), Named())


def test_a_subclass_may_go_on_with_what_it_has_installed():
    class Mine(Halving):
        pass

    module = Problem(chain())
    fitted(module, loader(), Mine())
    fitted(module, loader(), Mine())
    with pytest.raises(
        MisconfigurationException,
        match=r"Halving cannot train Sequential: Mine still replaces its forward pass.*Mine\(\.\.\.\)",
    ):
        fitted(module, loader(), Halving())
    Mine().uninstall(module)
    fitted(module, loader(), Halving())


def test_a_network_that_does_not_fit_changes_nothing():
    rule, module = Halving(), Problem(chain())
    fitted(module, loader(), rule)
    with pytest.raises(ValueError, match="1 layer"):
        rule.install(Problem(nn.Sequential(nn.Linear(6, 3))))
    x = torch.ones(1, 6)
    halved = module.net(x)
    rule.uninstall()
    assert torch.equal(module.net(x), 2 * halved)


def test_modules_of_its_own_start_afresh_with_another_network():
    rule = LocalCodes(seed=0)
    fitted(Problem(chain(5)), loader(), rule)
    learned = copy.deepcopy(rule.decoders.state_dict())
    assert set(learned) == {"decoder/0", "decoder/1"}
    again = LocalCodes(seed=0)
    again.load_rule_state({"decoders": learned})
    fitted(Problem(chain(5)), loader(), again)  # a checkpoint's are kept
    assert again.decoders.state_dict()["decoder/0"]["optimizer"]["state"][0]["step"] == 8
    fitted(Problem(chain(7)), loader(), rule)
    assert rule.decoders.state_dict()["decoder/0"]["module"]["weight"].shape == (7, 7)


def test_a_rule_without_anything_of_its_own_lets_go_of_the_network():
    rule = bpf.DirectFeedbackAlignment()
    fitted(Problem(chain()), loader(), rule)
    for name in ("parts", "found_network"):
        with pytest.raises(AssertionError, match="has not been installed"):
            getattr(rule, name)


# --- whose turn it is ---


class Turns(pl.Callback):
    """Notes in every batch, and in every validation, whether the network is replaced."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append((trainer.current_epoch, "forward" in pl_module.net.__dict__))


def test_the_network_is_replaced_in_the_rules_epochs_alone():
    turns = Turns()
    module = Problem(chain())
    fitted(module, loader(rows=16), Halving(start_epoch=1, stop_epoch=2), turns, max_epochs=3)
    assert turns.seen == [(0, False), (1, True), (2, False)]


def test_the_network_is_itself_in_the_sanity_check_of_a_rule_that_comes_later():
    seen: list[bool] = []

    class Validates(Problem):
        def validation_step(self, batch, index):
            seen.append("forward" in self.net.__dict__)

    for start_epoch in (0, 1):
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            max_epochs=1,
            enable_progress_bar=False,
            enable_checkpointing=False,
            num_sanity_val_steps=1,
            limit_val_batches=1,
            callbacks=[Halving(start_epoch=start_epoch)],
        )
        trainer.fit(Validates(chain()), loader(), loader())
    assert seen == [True, True, False, False]


class Stops(pl.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("rule", [Halving, partial(LocalCodes, learning_rates=[1.0, 0.5])], ids=["forward", "blocks"])
def test_a_fit_that_is_resumed_inside_an_epoch_takes_its_turn(rule, tmp_path):
    rows = [tensor.repeat(4, *[1] * (tensor.dim() - 1)) for tensor in loader(rows=16).dataset.tensors]
    data = DataLoader(TensorDataset(*rows), batch_size=16)  # four equal batches: a plain loader begins at the first

    def run(**settings: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        module = Problem(chain(), optimizer="adamw")
        stops = Stops(str(tmp_path / "mid.ckpt"))
        fitted(module, data, rule(start_epoch=1, seed=3), stops, max_epochs=2, **settings)
        return dict(module.named_parameters())

    whole = run()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        again = run(ckpt_path=str(tmp_path / "mid.ckpt"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(("epochs", "replaced"), [({}, True), ({"stop_epoch": 1}, False)])
def test_evaluations_predict_as_trained(epochs: dict[str, int], replaced: bool):
    class Predicts(Problem):
        def predict_step(self, batch, index):
            return self.net(batch[0])

    rule, module = Halving(**epochs), Predicts(chain())
    fitted(module, loader(), rule, max_epochs=2)
    rule.uninstall()
    plain = module.net(loader().dataset.tensors[0])
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, callbacks=[rule], enable_progress_bar=False, enable_checkpointing=False
    )
    found = torch.cat(trainer.predict(module, loader()))
    # One product of all rows, or of 16 at once: equal math in float32.
    torch.testing.assert_close(found, plain / 2 if replaced else plain, rtol=1e-5, atol=1e-6)


def test_without_is_the_network_itself():
    rule, module = Halving(), Problem(chain())
    rule.install(module)
    x = torch.ones(1, 6)
    with rule.without():
        plain = module.net(x)
    assert torch.equal(module.net(x), plain / 2)
