"""Environments whose rewards count steps, for the tests of actor and critic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from lightning_bpfree.demos.actor_critic import ActorCritic
from lightning_bpfree.demos.modules import MLP


class Counting(gym.Env[Any, Any]):
    """Shows (seed % 100, steps so far); step t is rewarded by 10 t + action, and the episode ends after `length`."""

    observation_space = gym.spaces.Box(-1e3, 1e3, (2,), np.float32)
    action_space = gym.spaces.Discrete(3, start=5)

    def __init__(self, length: int = 3, truncates: bool = False) -> None:
        self.length, self.truncates = length, truncates

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        assert seed is not None, "every episode begins from a seed of its own"
        super().reset(seed=seed)
        self.start, self.t = seed % 100, 0
        return self.seen(), {}

    def seen(self) -> Any:
        return np.array([self.start, self.t], np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        assert self.t < self.length, "an episode that has ended is not stepped"
        self.t += 1
        end = self.t == self.length
        return self.seen(), 10.0 * self.t + float(action), end and not self.truncates, end and self.truncates, {}


@contextlib.contextmanager
def counting_worlds() -> Iterator[None]:
    """Ends-v0 and CutOff-v0 are registered within."""
    gym.register("Ends-v0", Counting, max_episode_steps=100)
    gym.register("CutOff-v0", Counting, kwargs={"truncates": True}, max_episode_steps=100)
    yield
    for name in ("Ends-v0", "CutOff-v0"):
        del gym.registry[name]


def counting_critic() -> nn.Linear:
    """V(start, t) = 2 start + 3 t + 1."""
    critic = nn.Linear(2, 1)
    with torch.no_grad():
        critic.weight.copy_(torch.tensor([[2.0, 3.0]]))
        critic.bias.fill_(1.0)
    return critic


def cartpole(**settings: Any) -> ActorCritic:
    return ActorCritic(MLP(4, [16], 2, "tanh"), MLP(4, [16], 1, "tanh"), **settings)


BATCH = torch.zeros(1)
