"""Episodes of an actor and critic run on, begin anew, and are decided by their seeds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from counting_episodes import BATCH, cartpole, counting_critic, counting_worlds
from lightning.pytorch import seed_everything
from problems import fitted
from torch import Tensor, nn

from lightning_bpfree.demos import episodes
from lightning_bpfree.demos.actor_critic import ActorCritic, OnlineSteps
from lightning_bpfree.demos.episodes import RunningEpisodes


@pytest.fixture(autouse=True)
def _worlds() -> Iterator[None]:
    with counting_worlds():
        yield


# --- running episodes ------------------------------------------------------------------------------------------------


def singles(env_id: str, seeds: list[int], actions: Tensor, max_steps: int) -> Iterator[list[Any]]:
    """Each step of episodes of single environments that begin from these seeds, one after the other."""
    envs = [gym.make(env_id, max_episode_steps=max_steps) for _ in range(actions.shape[1])]
    left = iter(seeds)
    seen = [env.reset(seed=next(left))[0] for env in envs]
    for row in actions.tolist():
        steps = [env.step(action) for env, action in zip(envs, row, strict=True)]
        seen = [step[0] for step in steps]
        yield [[step[i] for step in steps] for i in range(4)]
        for i, step in enumerate(steps):
            if step[2] or step[3]:
                seen[i] = envs[i].reset(seed=next(left))[0]


@pytest.mark.parametrize("in_one_array", [True, False])
def test_cartpole_runs_as_single_environments_do(in_one_array: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_one_array:
        monkeypatch.setattr(episodes, "_CARTPOLE_VECTOR", "none")
    running, actions = RunningEpisodes("CartPole-v1", 3, max_steps=12), torch.randint(2, (60, 3))
    left, ends = list(range(100, 200)), torch.zeros(2, dtype=torch.int64)
    running.begin([left.pop(0) for _ in range(3)])
    for row, want in zip(actions, singles("CartPole-v1", list(range(100, 200)), actions, 12), strict=True):
        step = running.step(row)
        np.testing.assert_allclose(step.observations, np.stack(want[0]), rtol=1e-5, atol=1e-6)
        assert [step.rewards.tolist(), step.terminated.tolist()] == want[1:3]
        assert step.done.tolist() == [a or b for a, b in zip(want[2], want[3], strict=True)]
        ends += torch.stack([step.terminated.sum(), (step.done & ~step.terminated).sum()])
        if step.returns:
            running.renew([left.pop(0) for _ in step.returns])
    assert ends.min() > 2  # episodes of both kinds: fallen, and cut off


def test_returns_are_the_sums_of_the_rewards() -> None:
    running = RunningEpisodes("Ends-v0", 2)
    running.begin([1, 2])
    returns = []
    for i in range(6):
        step = running.step(torch.tensor([0, 2]))
        returns.append(step.returns)
        if step.returns:
            running.renew([3 + i, 4 + i])
    assert returns == [[], [], [60 + 3 * 5, 60 + 3 * 7]] * 2


def test_copies_hold_no_environment_and_begin_anew() -> None:
    module = cartpole(num_envs=3, max_steps=5)
    module.training_step(BATCH, 0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.running.observations is None
        assert other.training_step(BATCH, 0)["action"].shape == (3,)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_a_run_is_decided_by_the_global_seed() -> None:
    runs = []
    for seed in (3, 3, 4):
        seed_everything(seed, verbose=False)
        module = cartpole(max_steps=10)
        fitted(module, OnlineSteps(30, 2))
        runs.append(torch.cat([parameter.flatten() for parameter in module.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_training_meets_no_seed_of_validation_or_test(monkeypatch: pytest.MonkeyPatch) -> None:
    module = cartpole(num_envs=2)
    assert min(module._new_seeds(1000)) >= 1 << 21
    torch.manual_seed(5)
    first = module._new_seeds(4)
    monkeypatch.setattr(ActorCritic, "global_rank", 1)
    torch.manual_seed(5)
    assert set(module._new_seeds(4)).isdisjoint(first)


def test_the_return_is_a_function_of_the_seeds() -> None:
    module = cartpole()
    torch.manual_seed(1)
    first, state = module.mean_return(torch.arange(7, 12)), torch.get_rng_state()
    torch.rand(3)
    module.training_step(BATCH, 0)
    assert module.mean_return(torch.arange(7, 12)) == first
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    module.mean_return(torch.arange(7, 12))
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(1).get_state())  # it draws from no global generator


def test_actions_of_evaluation_are_drawn_from_the_softmax() -> None:
    actor = nn.Linear(2, 3)
    with torch.no_grad():
        actor.weight.zero_()
        actor.bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    module = ActorCritic(actor, counting_critic(), "Ends-v0")
    # three actions with a mean of 5 + 0.3 + 2 * 0.2 and a variance of 0.3 + 4 * 0.2 - 0.7**2
    want, error = 60 + 3 * 5.7, (3 * 0.61 / 2000) ** 0.5
    assert abs(float(module.mean_return(torch.arange(2000))) - want) < 4 * error


def test_validation_between_steps_leaves_the_running_episodes_alone() -> None:
    module = ActorCritic(nn.Linear(2, 3), counting_critic(), "Ends-v0", num_envs=2)
    module.training_step(BATCH, 0)
    before = module.running.observations.copy()
    module.mean_return(torch.tensor([1, 2]))  # as many episodes as run
    module.training_step(BATCH, 1)
    assert (module.running.observations - before).tolist() == [[0, 1], [0, 1]]
