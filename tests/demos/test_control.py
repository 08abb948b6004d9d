"""Returns are those of a plain loop over one environment, whatever ran before; seeds do not meet; training improves."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_bpfree.demos import control, episodes
from lightning_bpfree.demos.control import ControlModule, EpisodeSeeds
from lightning_bpfree.demos.modules import MLP
from lightning_bpfree.methods.evolution_strategy.rule import EvolutionStrategy
from lightning_bpfree.methods.evolution_strategy.search.snes import SNES


class World(gym.Env[Any, Any]):
    """Episodes of 1 + seed % 4 steps; a step is rewarded by the action's sum plus noise from the environment's seed.

    Every later episode, which follows an end without a seed, is rewarded by a million a step.
    """

    observation_space = gym.spaces.Box(-1, 1, (2, 3), np.float32)

    def __init__(self, action_space: gym.Space[Any], noise: float = 0.0, truncates: bool = False) -> None:
        self.action_space, self.noise, self.truncates = action_space, noise, truncates

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.first, self.left = seed is not None, 1 if seed is None else 1 + seed % 4
        return self.np_random.uniform(-1, 1, (2, 3)).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.left -= 1
        reward = float(np.sum(action)) + self.noise * self.np_random.normal() if self.first else 1e6
        end = self.left == 0
        observation = self.np_random.uniform(-1, 1, (2, 3)).astype(np.float32)
        return observation, reward, end and not self.truncates, end and self.truncates, {}


BOX = gym.spaces.Box(np.array([[-1.0, 0.0]], np.float32), np.array([[1.0, 6.0]], np.float32))
WORLDS: dict[str, dict[str, Any]] = {
    "Numbered-v0": {"action_space": gym.spaces.Discrete(3, start=5)},
    "Truncated-v0": {"action_space": gym.spaces.Discrete(3, start=5), "truncates": True},
    "Noisy-v0": {"action_space": gym.spaces.Discrete(2), "noise": 1.0},
    "Boxed-v0": {"action_space": BOX},
    "Unbounded-v0": {"action_space": gym.spaces.Box(-np.inf, np.inf, (1,))},
}


@pytest.fixture(autouse=True)
def _worlds() -> Iterator[None]:
    for name, kwargs in WORLDS.items():
        gym.register(name, World, kwargs=kwargs, max_episode_steps=100)
    gym.register("Endless-v0", World, kwargs=WORLDS["Numbered-v0"])
    yield
    for name in [*WORLDS, "Endless-v0"]:
        del gym.registry[name]


class Constant(nn.Module):
    """A policy that sees nothing."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


def balancer() -> nn.Linear:
    """Pushes to the side that the pole leans to: it stands for 25 to 70 steps."""
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
        net.bias.zero_()
    return net


def by_hand(module: ControlModule, env_id: str, seed: int) -> float:
    """The return of one episode of one environment, by the loop of gymnasium's documentation."""
    env = gym.make(env_id)
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        with torch.no_grad():
            scores = module.net(torch.as_tensor(observation, dtype=torch.float32)[None])[0]
        if isinstance(env.action_space, gym.spaces.Discrete):
            action: Any = int(env.action_space.start) + int(scores.argmax())
        else:
            assert isinstance(env.action_space, gym.spaces.Box)
            middle = (env.action_space.high + env.action_space.low) / 2
            reach = (env.action_space.high - env.action_space.low) / 2
            action = middle + reach * np.tanh(scores.numpy().reshape(middle.shape))
        observation, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
    env.close()
    return total


def trainer(**kwargs: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, **{"enable_checkpointing": False, **quiet, **kwargs})


def weight(module: ControlModule) -> Tensor:
    return module.net.get_parameter("layers.0.weight")


def trained(
    ckpt_path: Path | None = None, callbacks: Sequence[Callback] = (), **settings: Any
) -> tuple[ControlModule, Trainer]:
    """Six generations of a linear policy."""
    seed_everything(3, verbose=False)
    module = ControlModule(MLP(4, [], 2), lr=1.0, optimizer="sgd", max_steps=60)
    rule = EvolutionStrategy(SNES(sigma=0.5), 10, maximize=True, **{"chunk_size": 1, **settings})
    run = trainer(max_epochs=3, limit_val_batches=0, callbacks=[rule, *callbacks], enable_checkpointing=bool(callbacks))
    run.fit(module, EpisodeSeeds(4, 2), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return module, run


class Fitted(NamedTuple):
    """A module that was trained, what it logged, a checkpoint of its second epoch, and the sizes of environments."""

    module: ControlModule
    before: float
    logged: dict[str, Tensor]
    checkpoint: Path
    made: list[int]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder, made, make_vec = tmp_path_factory.mktemp("fit"), [], gym.make_vec

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["num_envs"])
        return make_vec(*args, **kwargs)

    seed_everything(3, verbose=False)
    before = float(ControlModule(MLP(4, [], 2), max_steps=60).mean_return(torch.arange(100)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "make_vec", counted)
        module, run = trained(callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)])
    return Fitted(module, before, dict(run.callback_metrics), folder / "epoch=1.ckpt", made)


# --- returns ---


@pytest.mark.parametrize("in_one_array", [True, False])
def test_cartpole_returns_are_those_of_a_plain_loop(in_one_array: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_one_array:
        monkeypatch.setattr(episodes, "_CARTPOLE_VECTOR", "none")
    module, seeds = ControlModule(balancer()), [3, 2_000_000, 4, 1]
    returns = module.episodes.returns(seeds, module.scores)
    assert isinstance(module.episodes._environment(4), gym.vector.SyncVectorEnv) is not in_one_array
    assert returns.tolist() == [by_hand(module, "CartPole-v1", seed) for seed in seeds]
    assert len(set(returns.tolist())) > 2
    assert module.mean_return(torch.tensor(seeds)) == returns.mean()


@pytest.mark.parametrize(
    ("env_id", "net"),
    [
        ("Pendulum-v1", MLP(3, [5], 1, "tanh")),
        ("Noisy-v0", MLP(6, [5], 2)),
        ("Numbered-v0", MLP(6, [5], 3)),
        ("Truncated-v0", MLP(6, [5], 3)),
        ("Boxed-v0", MLP(6, [5], 2)),
    ],
)
def test_returns_are_those_of_a_plain_loop(env_id: str, net: nn.Module) -> None:
    module, seeds = ControlModule(net, env_id), [5, 2, 7]
    returns = module.episodes.returns(seeds, module.scores)
    torch.testing.assert_close(returns, torch.tensor([by_hand(module, env_id, seed) for seed in seeds]))


@pytest.mark.parametrize(("env_id", "net"), [("CartPole-v1", balancer()), ("Noisy-v0", MLP(6, [5], 2))])
def test_a_return_depends_on_its_seed_and_on_nothing_before_it(env_id: str, net: nn.Module) -> None:
    module = ControlModule(net, env_id)
    first = module.episodes.returns([1, 2, 3], module.scores)
    module.mean_return(torch.tensor([7, 8, 9]))
    module.mean_return(torch.tensor([7]))
    assert torch.equal(module.episodes.returns([1, 2, 3], module.scores), first)
    assert torch.equal(module.episodes.returns([3, 1], module.scores), first[[2, 0]])


@pytest.mark.parametrize("env_id", ["Numbered-v0", "Truncated-v0"])
def test_nothing_counts_after_the_end_and_stepping_stops(env_id: str) -> None:
    module = ControlModule(Constant(0.0, 1.0, 0.0), env_id)
    steps: list[int] = []
    returns = module.episodes.returns([0, 1, 3], lambda seen: steps.append(len(seen)) or module.scores(seen))
    assert returns.tolist() == [6.0 * length for length in (1, 2, 4)]  # the second of the actions 5, 6, 7
    assert steps == [3, 3, 3, 3]


def test_a_constant_push_drops_the_pole_and_a_limit_ends_episodes() -> None:
    seeds = torch.arange(50)
    assert 8 <= ControlModule(Constant(0.0, 1.0)).mean_return(seeds) <= 11
    assert ControlModule(Constant(0.0, 1.0), max_steps=5).mean_return(seeds) == 5
    assert ControlModule(Constant(0.0), "Pendulum-v1", max_steps=2).mean_return(seeds) > -2 * 20
    assert ControlModule(Constant(0.0, 0.0, 1.0), "Endless-v0", max_steps=2).mean_return(torch.tensor([3])) == 14


@pytest.mark.parametrize("score", [-math.inf, -1e9, 0.0, 1e9, math.inf])
def test_actions_fill_their_box_and_do_not_leave_it(score: float) -> None:
    actions = ControlModule(Constant(0.0, 0.0), "Boxed-v0").episodes.actions(torch.full((2, 2), score))
    assert actions.shape == (2, 1, 2)
    assert all(BOX.contains(action) for action in actions)
    expected = {-1: BOX.low, 0: (BOX.low + BOX.high) / 2, 1: BOX.high}[int(np.sign(score))]
    assert np.array_equal(actions[0], expected)


def test_the_return_is_a_float_without_a_graph_in_every_precision() -> None:
    module = ControlModule(balancer())
    value = module.mean_return(torch.arange(2))
    assert value.dtype == torch.float32
    assert not value.requires_grad
    for cast in (module.double(), module.bfloat16()):
        assert cast.mean_return(torch.arange(2)) > 20


def test_backprop_cannot_train_it() -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer(max_epochs=1, limit_val_batches=0).fit(ControlModule(balancer(), max_steps=5), EpisodeSeeds(2, 1))


# --- copies, checkpoints ---


def test_copies_hold_no_environment_and_give_the_same_returns() -> None:
    module, seeds = ControlModule(balancer()), torch.arange(3)
    value = module.mean_return(seeds)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.episodes is not module.episodes
        assert set(other.episodes._environments) == {1}  # the one that its spaces were read from
        assert other.mean_return(seeds) == value
    assert len(pickle.dumps(module.episodes)) < 200


def test_a_checkpoint_holds_the_network_and_no_environment(fitted: Fitted) -> None:
    saved = torch.load(fitted.checkpoint, weights_only=True)
    assert set(saved["state_dict"]) == {"net.layers.0.weight", "net.layers.0.bias"}
    again = ControlModule.load_from_checkpoint(fitted.checkpoint, net=MLP(4, [], 2), weights_only=True)
    assert dict(again.hparams) == {"env_id": "CartPole-v1", "lr": 1.0, "optimizer": "sgd", "max_steps": 60}
    assert torch.equal(weight(again), torch.load(fitted.checkpoint)["state_dict"]["net.layers.0.weight"])


# --- seeds ---


def test_seeds_of_the_three_stages_do_not_meet() -> None:
    data = EpisodeSeeds(64, 100, val_episodes=1 << 20, test_episodes=1 << 20)
    val, test = (loader.dataset for loader in (data.val_dataloader(), data.test_dataloader()))
    assert isinstance(val, control.SeedDataset)
    assert isinstance(test, control.SeedDataset)
    assert (int(test[0]), int(test[-1 + len(test)])) == (0, (1 << 20) - 1)
    assert (int(val[0]), int(val[-1 + len(val)])) == (1 << 20, (1 << 21) - 1)
    train = torch.cat(list(data.train_dataloader()))
    assert train.dtype == torch.int64
    assert len(train) == 6400
    assert len(train.unique()) > 6390
    assert train.min() >= 1 << 21
    assert train.max() < 1 << 31


def test_seeds_for_training_are_new_in_each_epoch_and_decided_by_the_global_seed() -> None:
    loader, runs = EpisodeSeeds(4, 3).train_dataloader(), []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append([torch.stack(list(loader)) for epoch in range(2)])
    assert torch.equal(torch.stack(runs[0]), torch.stack(runs[1]))
    assert not torch.equal(*runs[0])


def test_evaluation_is_the_mean_over_all_its_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_EVAL_BATCH", 3)
    module, data = ControlModule(balancer()), EpisodeSeeds(val_episodes=4, test_episodes=5)
    assert [len(seeds) for seeds in data.test_dataloader()] == [3, 2]
    run = trainer()
    tested = run.test(module, data, verbose=False)[0]["test_return"]
    assert tested == pytest.approx(float(module.mean_return(torch.arange(5))))
    validated = run.validate(module, data, verbose=False)[0]["val_return"]
    assert validated == pytest.approx(float(module.mean_return((1 << 20) + torch.arange(4))))


# --- training ---


def test_evolution_improves_the_return(fitted: Fitted) -> None:
    assert fitted.before < 30
    assert fitted.module.mean_return(torch.arange(100)) > 50
    assert 0 < fitted.logged["train_return"] <= 60


def test_equal_seeds_give_equal_runs_by_loop_and_where_vectorising_is_tried_in_vain(
    fitted: Fitted, caplog: pytest.LogCaptureFixture
) -> None:
    again, _ = trained(chunk_size="auto")
    assert torch.equal(weight(again), weight(fitted.module))
    assert "members one by one, because vectorizing fails" in caplog.text


def test_a_run_resumed_after_an_epoch_meets_the_same_episodes(fitted: Fitted) -> None:
    saving = ModelCheckpoint(fitted.checkpoint.parent, "{epoch}", save_top_k=-1)
    resumed, _ = trained(ckpt_path=fitted.checkpoint, callbacks=[saving])
    assert torch.equal(weight(resumed), weight(fitted.module))


def test_evaluations_of_a_step_share_the_environments(fitted: Fitted) -> None:
    assert fitted.made == [1, 4]


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_optimizers(optimizer: Any, kind: type) -> None:
    made = ControlModule(balancer(), lr=0.5, optimizer=optimizer).configure_optimizers()
    assert type(made) is kind
    assert made.param_groups[0]["lr"] == 0.5


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ControlModule(balancer(), "CartPoole-v1"), "env_id is 'CartPoole-v1': .*Give the id of a registered"),
        (lambda: ControlModule(balancer(), "CartPole-v99"), "env_id is 'CartPole-v99'"),
        (lambda: ControlModule(balancer(), "not_there:CartPole-v1"), "env_id is 'not_there:CartPole-v1'"),
        (lambda: ControlModule(balancer(), "not an id"), "env_id is 'not an id'"),
        (lambda: ControlModule(balancer(), "FrozenLake-v1"), r"observations are Discrete\(16\); choose"),
        (lambda: ControlModule(balancer(), "Unbounded-v0"), "actions are Box.*Box that has bounds"),
        (lambda: ControlModule(balancer(), "Endless-v0"), "'Endless-v0', whose episodes may never end; give max_steps"),
        (lambda: ControlModule(balancer(), max_steps=0), "max_steps=0: give a whole number of at least 1"),
        (lambda: ControlModule(balancer(), lr=0.0), r"lr=0\.0: give a positive number"),
        (lambda: ControlModule(balancer(), optimizer="lion"), "optimizer='lion': choose 'sgd'"),  # type: ignore[arg-type]
        (
            lambda: ControlModule(nn.Linear(4, 3)).mean_return(torch.arange(2)),
            r"net gives scores of shape \(2, 3\), but 'CartPole-v1' .*needs \('B', 2\); build it with an output of 2",
        ),
        (lambda: ControlModule(nn.Flatten(0)).mean_return(torch.arange(2)), r"net gives scores of shape \(8,\)"),
        (lambda: ControlModule(MLP(8, [], 2)).mean_return(torch.arange(2)), "MLP was built for inputs"),
        (lambda: ControlModule(balancer()).mean_return(torch.arange(0)), r"seeds are \(0,\), torch.int64; give an"),
        (lambda: ControlModule(balancer()).mean_return(torch.zeros(2)), r"seeds are \(2,\), torch.float32"),
        (lambda: ControlModule(balancer()).mean_return(torch.zeros(2, 2).long()), r"seeds are \(2, 2\)"),
        (lambda: ControlModule(balancer()).training_step([1, 2], 0), "seeds are list"),  # type: ignore[arg-type]
        (lambda: ControlModule(balancer()).mean_return(torch.tensor([1, -1])), "seeds go down to -1; give"),
        (lambda: EpisodeSeeds(0), "batch_size=0: give a whole number of at least 1"),
        (lambda: EpisodeSeeds(batches_per_epoch=0), "batches_per_epoch=0: give a whole number of at least 1"),
        (lambda: EpisodeSeeds(val_episodes=0), r"val_episodes=0: give a whole number in \[1"),
        (lambda: EpisodeSeeds(test_episodes=(1 << 20) + 1), r"test_episodes=1048577: give a whole number in \[1"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-bpfree\[control\]"):
        ControlModule(balancer())
