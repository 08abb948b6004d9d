"""Errors of temporal differences are those worked out by hand; backprop learns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_episodes import BATCH, cartpole, counting_critic, counting_worlds
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import fitted
from torch import nn

from lightning_bpfree.demos.actor_critic import ActorCritic, OnlineSteps
from lightning_bpfree.demos.control import EpisodeSeeds
from lightning_bpfree.demos.episodes import RunningEpisodes
from lightning_bpfree.demos.modules import MLP


@pytest.fixture(autouse=True)
def _worlds() -> Iterator[None]:
    with counting_worlds():
        yield


# --- the training step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Ends-v0", "CutOff-v0"])
def test_errors_of_temporal_differences_by_hand(env_id: str) -> None:
    module = ActorCritic(nn.Linear(2, 3), counting_critic(), env_id, num_envs=2, gamma=0.5)
    starts = []
    for t in (0, 1, 2, 0, 1, 2, 0):  # three steps an episode, and no step between two episodes
        out = module.training_step(BATCH, t)
        if t == 0:
            starts = module.running.observations[:, 0]
        action = out["action"]
        reward = 10 * (t + 1) + 5 + action  # the actions are 5, 6, 7
        now, after = (torch.from_numpy(2 * starts + 3 * step + 1) for step in (t, t + 1))
        bootstrap = 0.0 if t == 2 and env_id == "Ends-v0" else 0.5
        torch.testing.assert_close(out["reward"], reward + bootstrap * after - now, rtol=1e-5, atol=1e-4)
        assert out["done"].tolist() == [t == 2] * 2
    assert module.running.observations[:, 1].tolist() == [1.0, 1.0]


def test_types_and_shapes() -> None:
    out = cartpole(num_envs=3).training_step(BATCH, 0)
    assert {name: (value.dtype, value.shape) for name, value in out.items()} == {
        "loss": (torch.float32, ()),
        "action": (torch.int64, (3,)),
        "reward": (torch.float32, (3,)),
        "done": (torch.bool, (3,)),
    }
    assert [name for name, value in out.items() if value.requires_grad] == ["loss"]


def test_gradients_are_those_of_policy_gradient_and_semi_gradient() -> None:
    module = ActorCritic(nn.Linear(2, 3), counting_critic(), "Ends-v0", num_envs=2, gamma=0.5).double()
    module.running.begin([7, 9])
    seen = torch.tensor([[7.0, 0.0], [9.0, 0.0]], dtype=torch.float64)
    out = module.training_step(BATCH, 0)
    out["loss"].backward()
    delta, action = out["reward"], out["action"]
    # d log softmax(z)[a] / dz = onehot(a) - softmax(z)
    off = torch.eye(3, dtype=torch.float64)[action] - torch.softmax(module.actor(seen), 1)
    assert isinstance(module.actor, nn.Linear)
    assert isinstance(module.critic, nn.Linear)
    for gradient, want in [
        (module.actor.weight.grad, -(delta[:, None] * off).T @ seen / 2),
        (module.actor.bias.grad, -(delta[:, None] * off).mean(0)),
        (module.critic.weight.grad, -(delta[:, None] * seen).mean(0, keepdim=True)),
        (module.critic.bias.grad, -delta.mean(0, keepdim=True)),
    ]:
        torch.testing.assert_close(gradient, want.detach(), rtol=1e-10, atol=1e-10)


def test_actions_are_drawn_from_the_softmax_of_the_logits() -> None:
    actor = nn.Linear(2, 3)
    with torch.no_grad():
        actor.weight.zero_()
        actor.bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    module = ActorCritic(actor, counting_critic(), "Ends-v0", num_envs=50)
    drawn = torch.cat([module.training_step(BATCH, i)["action"] for i in range(60)])
    shares = drawn.bincount(minlength=3) / len(drawn)
    for share, p in zip(shares.tolist(), (0.5, 0.3, 0.2), strict=True):
        assert abs(share - p) < 4 * (p * (1 - p) / len(drawn)) ** 0.5


def test_the_actor_is_called_once() -> None:
    module, calls = cartpole(), []
    module.actor.register_forward_hook(lambda *_: calls.append(1))
    for i in range(3):
        module.training_step(BATCH, i)
    assert len(calls) == 3


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_backprop_improves_the_return() -> None:
    seed_everything(0, verbose=False)
    module, seeds = cartpole(num_envs=16, lr=0.01, max_steps=100), torch.arange(50)
    before = module.mean_return(seeds)
    fitted(module, OnlineSteps(400), limit_val_batches=0)
    assert before < 30
    assert module.mean_return(seeds) > 2 * before


def test_what_is_logged() -> None:
    module = ActorCritic(nn.Linear(2, 3), counting_critic(), "Ends-v0", num_envs=2)
    run = fitted(module, OnlineSteps(4, val_episodes=3, test_episodes=5), num_sanity_val_steps=0)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert set(logged) == {"train_return", "val_return"}
    assert 75 <= logged["train_return"] <= 81  # 60 and three actions from 5 to 7; nothing of the episodes that run on
    assert logged["val_return"] == pytest.approx(float(module.mean_return((1 << 20) + torch.arange(3))))
    tested = run.test(module, OnlineSteps(4, test_episodes=5), verbose=False)[0]
    assert tested == {"test_return": pytest.approx(float(module.mean_return(torch.arange(5))))}


def test_without_an_end_there_is_no_training_return() -> None:
    run = fitted(cartpole(), OnlineSteps(2), limit_val_batches=0)
    assert "train_return" not in run.callback_metrics


def test_training_return_is_that_of_its_epoch() -> None:
    rewards: list[float] = []

    class Rewards(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            rewards.append(float(outputs["reward"]))

    actor, critic = nn.Linear(2, 3), nn.Linear(2, 1)
    for parameter in (*actor.parameters(), *critic.parameters()):
        nn.init.zeros_(parameter)  # without values the error of temporal differences is the reward
    module = ActorCritic(actor, critic, "Ends-v0", num_envs=1, gamma=0.0, lr=1e-9, optimizer="sgd")
    run = fitted(module, OnlineSteps(3), Rewards(), max_epochs=2, limit_val_batches=0)
    assert sum(rewards[:3]) != pytest.approx(sum(rewards[3:]), rel=1e-5)
    assert float(run.callback_metrics["train_return"]) == pytest.approx(sum(rewards[3:]), rel=1e-5)


def test_a_checkpoint_holds_the_networks_and_no_environment(tmp_path: Path) -> None:
    def run(**settings: Any) -> ActorCritic:
        module, saving = cartpole(max_steps=5), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fitted(module, OnlineSteps(8), saving, limit_val_batches=0, enable_checkpointing=True, **settings)
        return module

    run()
    checkpoint = tmp_path / "epoch=0.ckpt"
    assert {key.split(".")[0] for key in torch.load(checkpoint, weights_only=True)["state_dict"]} == {"actor", "critic"}
    networks = {"actor": MLP(4, [16], 2, "tanh"), "critic": MLP(4, [16], 1, "tanh")}
    again = ActorCritic.load_from_checkpoint(checkpoint, **networks, weights_only=True)
    assert (again.hparams["max_steps"], again.running.observations) == (5, None)
    assert run(max_epochs=2, ckpt_path=checkpoint).running.observations is not None  # it goes on, in new episodes


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_optimizers_have_a_group_for_each_network(optimizer: Any, kind: type) -> None:
    for critic_lr in (None, 0.25):
        module = cartpole(lr=0.5, critic_lr=critic_lr, optimizer=optimizer)
        made = module.configure_optimizers()
        assert type(made) is kind
        actor, critic = made.param_groups
        assert (actor["lr"], critic["lr"]) == (0.5, critic_lr or 0.5)
        assert list(map(id, actor["params"])) == list(map(id, module.actor.parameters()))
        assert list(map(id, critic["params"])) == list(map(id, module.critic.parameters()))


def test_steps_are_numbers_and_seeds_are_those_of_control() -> None:
    data, other = OnlineSteps(5, 3, 4), EpisodeSeeds(val_episodes=3, test_episodes=4)
    assert [int(batch) for batch in data.train_dataloader()] == [0, 1, 2, 3, 4]
    for ours, theirs in [
        (data.val_dataloader(), other.val_dataloader()),
        (data.test_dataloader(), other.test_dataloader()),
    ]:
        assert torch.equal(torch.cat(list(ours)), torch.cat(list(theirs)))


# --- bad input -------------------------------------------------------------------------------------------------------


def step_of(actor: nn.Module, critic: nn.Module) -> Any:
    return ActorCritic(actor, critic, num_envs=3).training_step(BATCH, 0)


def shared() -> ActorCritic:
    trunk = nn.Linear(4, 8)
    return ActorCritic(nn.Sequential(trunk, nn.Linear(8, 2)), nn.Sequential(trunk, nn.Linear(8, 1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cartpole(env_id="CartPoole-v1"), "env_id is 'CartPoole-v1'"),
        (lambda: cartpole(env_id="Pendulum-v1"), "'Pendulum-v1', whose actions are Box.*with Discrete actions"),
        (lambda: cartpole(num_envs=0), "num_envs=0: give a whole number of at least 1"),
        (lambda: cartpole(gamma=1.5), r"gamma=1\.5: give a number in \[0"),
        (lambda: cartpole(lr=0.0), r"lr=0\.0: give a positive number"),
        (lambda: cartpole(critic_lr=-1.0), r"critic_lr=-1\.0: give a positive number"),
        (lambda: cartpole(optimizer="lion"), "optimizer='lion': choose 'sgd'"),
        (lambda: cartpole(max_steps=0), "max_steps=0: give a whole number of at least 1"),
        (shared, "critic shares parameters with actor; give it a network of its own"),
        (
            lambda: step_of(nn.Linear(4, 3), nn.Linear(4, 1)),
            r"actor gives logits of shape \(3, 3\) for 3 observations, but 'CartPole-v1' has 2 actions; build it",
        ),
        (lambda: step_of(nn.Linear(4, 2), nn.Linear(4, 2)), r"critic gives values of shape \(3, 2\) for 3 obs"),
        (lambda: cartpole().mean_return(torch.zeros(2)), r"seeds are \(2,\), torch.float32; give an integer"),
        (lambda: cartpole().mean_return(torch.tensor([-1])), "seeds go down to -1"),
        (lambda: OnlineSteps(0), "steps_per_epoch=0: give a whole number of at least 1"),
        (lambda: OnlineSteps(val_episodes=0), r"val_episodes=0: give a whole number in \[1"),
        (lambda: RunningEpisodes("CartPole-v1", 2).begin([1]), "There are 1 seeds for 2 episodes; give one for each"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_out_of_turn_are_refused() -> None:
    running = RunningEpisodes("Ends-v0", 2)
    with pytest.raises(RuntimeError, match=r"No episodes run yet; call begin\(\)"):
        running.step(torch.zeros(2).long())
    running.begin([1, 2])
    for _ in range(3):
        running.step(torch.zeros(2).long())
    with pytest.raises(RuntimeError, match=r"Episodes \[0, 1\] have ended; call renew\(\)"):
        running.step(torch.zeros(2).long())


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-bpfree\[control\]"):
        cartpole()
