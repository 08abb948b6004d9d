"""Episodes of gymnasium's environments: many at once, determined by policy and seed; or continuously renewed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import Name, PositiveInt, checked

# The only environment of gymnasium's own that runs many episodes in one array; no other one is written so in NumPy.
_CARTPOLE_VECTOR = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('This task needs gymnasium: pip install "lightning-bpfree[control]"') from error
    return gymnasium


def check_seeds(seeds: Tensor) -> None:
    """Raise ValueError unless these are seeds of episodes: integers of at least 0, shape (B,), one or more."""
    if not isinstance(seeds, Tensor) or seeds.dim() != 1 or not len(seeds) or seeds.is_floating_point():
        what = f"{tuple(seeds.shape)}, {seeds.dtype}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise ValueError(
            f"seeds are {what}; give an integer tensor of shape ('B',) with a seed or more, such as EpisodeSeeds's."
        )
    if seeds.min() < 0:
        raise ValueError(f"seeds go down to {int(seeds.min())}; give seeds of at least 0.")


def _cartpole_starts(seeds: list[int]) -> Any:
    """The states, shape (4, B), in which a single CartPole environment begins from these seeds."""
    import numpy as np
    from gymnasium.utils.seeding import np_random

    return np.stack([np_random(seed)[0].uniform(low=-0.05, high=0.05, size=4) for seed in seeds], axis=1)


class Episodes:
    """Episodes of a gymnasium environment, many at once, each started from its own seed.

    CartPole runs in one array; other environments step one after another. Environments are kept between calls, one set
    per number of episodes; copies and pickles do not contain them.

    Args:
        env_id: Id of a registered environment with observations in a box, and actions that are either numbered or in
            a box with bounds.
        max_steps: Steps after which an episode ends; None: the environment's own limit.

    Attributes:
        num_scores: Numbers that a policy returns for an observation: one for each numbered action, or one for each
            coordinate of an action in a box.

    Raises:
        ModuleNotFoundError: gymnasium is not installed.
        ValueError: An argument is out of range, or the environment is of another kind.
    """

    @checked
    def __init__(self, env_id: Name, max_steps: PositiveInt | None = None) -> None:
        gym = _gymnasium()
        try:
            spec = gym.spec(env_id)
        except (gym.error.Error, ModuleNotFoundError) as error:
            raise ValueError(
                f"env_id is {env_id!r}: {error} Give the id of a registered environment, such as 'CartPole-v1'."
            ) from error
        if max_steps is None and spec.max_episode_steps is None:
            raise ValueError(f"env_id is {env_id!r}, whose episodes may never end; give max_steps, such as 1000.")
        self.env_id, self.max_steps = env_id, max_steps
        self._in_one_array = spec.vector_entry_point == _CARTPOLE_VECTOR
        self._environments: dict[int, Any] = {}
        env = self._environment(1)
        self._action_space = env.single_action_space
        self.num_scores = self._checked_spaces(env.single_observation_space)

    def __reduce__(self) -> Any:
        return type(self), (self.env_id, self.max_steps)

    def _checked_spaces(self, observations: Any) -> int:
        spaces, actions = _gymnasium().spaces, self._action_space
        if not isinstance(observations, spaces.Box):
            raise ValueError(
                f"env_id is {self.env_id!r}, whose observations are {observations}; choose an environment with "
                "observations in a Box, or register a wrapped one (gymnasium.wrappers.TransformObservation)."
            )
        if isinstance(actions, spaces.Discrete):
            return int(actions.n)
        if isinstance(actions, spaces.Box) and actions.is_bounded():
            return int(actions.low.size)
        raise ValueError(
            f"env_id is {self.env_id!r}, whose actions are {actions}; choose an environment with Discrete actions, or "
            "with actions in a Box that has bounds."
        )

    def _environment(self, num: int) -> Any:
        if num not in self._environments:
            limit = {} if self.max_steps is None else {"max_episode_steps": self.max_steps}
            # The checker would look at each step of each episode.
            how, more = ("vector_entry_point", {}) if self._in_one_array else ("sync", {"disable_env_checker": True})
            make = _gymnasium().make_vec
            self._environments[num] = make(self.env_id, num_envs=num, vectorization_mode=how, **limit, **more)
        return self._environments[num]

    def _reset(self, env: Any, seeds: list[int]) -> Any:
        if not self._in_one_array:
            return env.reset(seed=seeds)[0]
        # CartPole in one array takes one seed for all: each episode gets the start that a single environment gives it.
        env.reset(seed=seeds[0])
        env.state = _cartpole_starts(seeds)
        return env.state.T.astype("float32")

    def actions(self, scores: Tensor) -> Any:
        """The actions for scores: the one with the highest score, or tanh of each score, scaled to the box.

        Args:
            scores: Shape (B, num_scores).

        Returns:
            An array of B actions.

        Raises:
            ValueError: The scores have another shape.
        """
        space = self._action_space
        if scores.dim() != 2 or scores.shape[1] != self.num_scores:
            raise ValueError(
                f"net gives scores of shape {tuple(scores.shape)}, but {self.env_id!r} with actions {space} needs "
                f"{('B', self.num_scores)}; build it with an output of {self.num_scores}."
            )
        if hasattr(space, "n"):
            return scores.argmax(1).cpu().numpy() + space.start
        shares = (1 + torch.tanh(scores.float()).cpu().numpy().reshape(-1, *space.shape)) / 2
        return (space.low + shares * (space.high - space.low)).clip(space.low, space.high).astype(space.dtype)

    @torch.no_grad()
    def returns(self, seeds: list[int], policy: Callable[[Any], Tensor]) -> Tensor:
        """The sum of the rewards of each episode, up to its first end, shape (B,), float32 on the CPU.

        It depends only on the policy and the episode's seed, and not on earlier calls.

        Args:
            seeds: One for each episode, at least 0.
            policy: From an array of observations, shape (B, ...), to scores, shape (B, num_scores).
        """
        import numpy as np

        env = self._environment(len(seeds))
        observations = self._reset(env, seeds)
        totals, running = np.zeros(len(seeds)), np.ones(len(seeds), dtype=bool)
        while running.any():
            observations, rewards, terminated, truncated, _ = env.step(self.actions(policy(observations)))
            totals += np.where(running, rewards, 0.0)  # an episode that has ended restarts, which does not count
            running &= ~(terminated | truncated)
        return torch.from_numpy(totals).float()


class Step(NamedTuple):
    """The result of one step of several episodes, on the CPU."""

    observations: Any  # where it led to, an array (num, ...); of an episode that ended, its last one
    rewards: Tensor  # float32, (num,)
    terminated: Tensor  # bool, (num,): the episode came to an end of its own
    done: Tensor  # bool, (num,): terminated, or cut off at the limit of steps
    returns: list[float]  # the sums of the rewards of the episodes that ended


class RunningEpisodes:
    """Episodes that are stepped together; new episodes replace those that end.

    Copies and pickles hold no environment; call :meth:`begin` on them first.

    Args:
        env_id: Id of a registered environment with observations in a box and numbered actions.
        num: Episodes at once, at least 1.
        max_steps: Steps after which an episode is truncated; None for the environment's own limit.

    Attributes:
        num_actions: Number of actions.
        observations: Current observations of the episodes, an array (num, ...); None before :meth:`begin`.

    Raises:
        ModuleNotFoundError: gymnasium is not installed.
        ValueError: An argument is out of range, or the environment is of another kind.

    Example:
        >>> running = RunningEpisodes("CartPole-v1", 2, max_steps=3)
        >>> running.begin([5, 6])
        >>> [running.step(torch.tensor([0, 1])).returns for _ in range(3)]
        [[], [], [3.0, 3.0]]
        >>> running.renew([7, 8])
    """

    @checked
    def __init__(self, env_id: Name, num: PositiveInt, max_steps: PositiveInt | None = None) -> None:
        self._episodes = Episodes(env_id, max_steps)
        space = self._episodes._action_space
        if not hasattr(space, "n"):
            raise ValueError(
                f"env_id is {env_id!r}, whose actions are {space}; choose an environment with Discrete actions."
            )
        self.num, self.num_actions = num, self._episodes.num_scores
        self.observations: Any = None
        self._first_action = int(space.start)
        self._env: Any = None
        self._totals: Any = None
        self._ended: list[int] = []

    def __reduce__(self) -> Any:
        return type(self), (self._episodes.env_id, self.num, self._episodes.max_steps)

    def begin(self, seeds: list[int]) -> None:
        """Start `num` new episodes, one per seed, and drop running ones."""
        import numpy as np

        self._check_number(seeds, self.num)
        self._env = self._episodes._environment(self.num)
        self.observations, self._totals, self._ended = self._episodes._reset(self._env, seeds), np.zeros(self.num), []

    def step(self, actions: Tensor) -> Step:
        """Take an action, from 0 to num_actions - 1, in each episode; shape (num,).

        Raises:
            RuntimeError: No episodes were started, or some have ended and were not renewed.
        """
        if self.observations is None:
            raise RuntimeError("No episodes run yet; call begin() with their seeds.")
        if self._ended:
            raise RuntimeError(f"Episodes {self._ended} have ended; call renew() with a seed for each.")
        observations, rewards, terminated, truncated = self._advance(actions.cpu().numpy() + self._first_action)
        self.observations, done = observations, terminated | truncated
        self._totals += rewards
        self._ended = done.nonzero()[0].tolist()
        returns = self._totals[self._ended].tolist()
        self._totals[self._ended] = 0.0
        rewards, terminated, done = map(torch.from_numpy, (rewards.astype("float32"), terminated, done))
        return Step(observations, rewards, terminated, done, returns)

    def _advance(self, actions: Any) -> Any:
        import numpy as np

        if self._episodes._in_one_array:
            return self._env.step(actions)[:4]
        # One after the other, since vectorized environments restart by themselves, and without a seed.
        steps = [env.step(action)[:4] for env, action in zip(self._env.envs, actions, strict=True)]
        observations, rewards, terminated, truncated = (np.stack(parts) for parts in zip(*steps, strict=True))
        return observations, rewards, terminated, truncated

    def renew(self, seeds: list[int]) -> None:
        """Replace the episodes that ended in the last step by new ones, one per seed."""
        env, ended = self._env, self._ended
        self._check_number(seeds, len(ended))
        self.observations = self.observations.copy()  # the last step's own stay what they are
        if self._episodes._in_one_array:
            env.state[:, ended] = _cartpole_starts(seeds)
            env.steps[ended], env.prev_done[ended] = 0, False
            self.observations[ended] = env.state[:, ended].T
        else:
            for index, seed in zip(ended, seeds, strict=True):
                self.observations[index] = env.envs[index].reset(seed=seed)[0]
        self._ended = []

    @staticmethod
    def _check_number(seeds: list[int], num: int) -> None:
        if len(seeds) != num:
            raise ValueError(f"There are {len(seeds)} seeds for {num} episodes; give one for each.")
