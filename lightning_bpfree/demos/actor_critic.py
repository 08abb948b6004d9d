"""Online reinforcement learning: an actor and a critic in running episodes, as a LightningModule and its data.

Plain backprop can train `ActorCritic`; its training step also returns the actions, their rewards and the ends of
episodes, for rules that train the actor with a reward.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bpfree.core.arguments import Fraction, Name, PositiveFloat, PositiveInt, check_arguments, checked
from lightning_bpfree.demos.control import _SEEDS, _TRAINING_SEEDS, EpisodeSeeds, NumEpisodes, SeedDataset
from lightning_bpfree.demos.episodes import Episodes, RunningEpisodes, check_seeds
from lightning_bpfree.demos.loading.split_loaders import pass_through

__all__ = ["ActorCritic", "OnlineSteps"]


class ActorCritic(LightningModule):
    """One-step actor-critic in gymnasium environments that run side by side, held and stepped by this module.

    A training step, whatever the batch is, takes one action in each of E = `num_envs` episodes, sampled from the
    softmax of the actor's logits, and returns a dict:

    - ``action``: int64 (E,), counted from 0;
    - ``reward``: float (E,), without a graph: the temporal-difference error, delta = r + gamma * V(S') - V(S).
      V(S') is omitted if the environment ended the episode, but not if the step limit did;
    - ``done``: bool (E,): the episodes that ended, in either way;
    - ``loss``: mean(-delta * log pi(action | S)) + 0.5 * mean((r + gamma * V(S') - V(S))**2), with a graph of the
      actor through log pi, and of the critic through V(S).

    The actor is called once per training step. Logs ``train_return``, the mean return of the episodes that ended in the
    epoch, if any, and as means over the epoch ``val_return`` and ``test_return``: returns of episodes from the seeds in
    the batch, int64 (B,). Their actions are also sampled, since this is the trained policy, and the seeds determine
    them; only an actor with its own noise draws from torch's global generator.

    Training episodes start from seeds that are drawn with torch's global generator; each device has its own episodes. A
    fit starts new ones. **Checkpoints hold no environment**: a resumed run starts new episodes, and differs from an
    uninterrupted one. Each call of the training step advances the environments: a rule that calls it several times in a
    step sees that many environment steps.

    Args:
        actor: Network from observations (E, ...) to logits (E, actions).
        critic: Network from observations (E, ...) to values (E, 1); shares no parameter with `actor`.
        env_id: Id of a registered environment with observations in a box and numbered actions.
        num_envs: Episodes at once, at least 1.
        gamma: Discount of the next value, in [0, 1].
        lr: Learning rate of the actor, above 0.
        critic_lr: Learning rate of the critic, above 0; None for `lr`.
        optimizer: ``sgd`` or ``adam``.
        max_steps: Steps after which an episode is truncated; None for the environment's own limit.

    Raises:
        ModuleNotFoundError: gymnasium is not installed.
        ValueError: An argument is out of range, or the kind of environment is not supported; from the first step, if
            the output of a network has the wrong shape.

    Example:
        >>> from lightning_bpfree.demos.modules import MLP
        >>> module = ActorCritic(MLP(4, [16], 2), MLP(4, [16], 1), "CartPole-v1", num_envs=3)
        >>> out = module.training_step(torch.zeros(1), 0)
        >>> {name: tuple(value.shape) for name, value in out.items()}
        {'loss': (), 'action': (3,), 'reward': (3,), 'done': (3,)}
    """

    def __init__(
        self,
        actor: nn.Module,
        critic: nn.Module,
        env_id: Name = "CartPole-v1",
        num_envs: PositiveInt = 4,
        gamma: Fraction = 0.98,
        lr: PositiveFloat = 1e-3,
        critic_lr: PositiveFloat | None = None,
        optimizer: Literal["sgd", "adam"] = "adam",
        max_steps: PositiveInt | None = None,
    ) -> None:
        check_arguments(ActorCritic, locals())
        super().__init__()
        if {*actor.parameters()} & {*critic.parameters()}:
            raise ValueError("ActorCritic: critic shares parameters with actor; give it a network of its own.")
        self.save_hyperparameters(ignore=["actor", "critic"])
        self.actor, self.critic = actor, critic
        self.running = RunningEpisodes(env_id, num_envs, max_steps)
        self.episodes = Episodes(env_id, max_steps)  # in environments of its own, so that validation disturbs nothing
        self._returns: list[float] = []  # of the episodes that ended in this epoch

    def forward(self, observations: Tensor) -> Tensor:
        """Logits of the actions, shape (B, actions)."""
        logits: Tensor = self.actor(observations)
        if logits.shape != (len(observations), self.running.num_actions):
            raise ValueError(
                f"actor gives logits of shape {tuple(logits.shape)} for {len(observations)} observations, but "
                f"{self.hparams['env_id']!r} has {self.running.num_actions} actions; build it with an output of "
                f"{self.running.num_actions}."
            )
        return logits

    def values(self, observations: Tensor) -> Tensor:
        """The critic's values of observations, shape (B,)."""
        values: Tensor = self.critic(observations)
        if values.shape != (len(observations), 1):
            raise ValueError(
                f"critic gives values of shape {tuple(values.shape)} for {len(observations)} observations; build it "
                "with an output of 1."
            )
        return values.squeeze(1)

    def _tensor(self, observations: Any) -> Tensor:
        """An array of observations in the networks' precision, on their device."""
        return torch.as_tensor(observations).to(next(self.parameters(), torch.empty(0)))

    def _new_seeds(self, num: int) -> list[int]:
        # Ranks have equal generators after seed_everything, and would live through the same episodes.
        own = torch.randint(_TRAINING_SEEDS, (num,)) + self.global_rank * _SEEDS
        return (2 * _SEEDS + own % _TRAINING_SEEDS).tolist()

    def on_train_start(self) -> None:
        """Start new episodes."""
        self.running.begin(self._new_seeds(self.running.num))
        self._returns.clear()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Step all environments once; returns loss, action, reward and done, see the class."""
        if self.running.observations is None:
            self.running.begin(self._new_seeds(self.running.num))
        before = self._tensor(self.running.observations)
        log_policy = torch.log_softmax(self(before), 1)
        action = torch.multinomial(log_policy.detach().exp(), 1)
        step = self.running.step(action.squeeze(1))
        done = step.done.to(self.device)
        if step.returns:
            self._returns.extend(step.returns)
            self.running.renew(self._new_seeds(len(step.returns)))
        values = self.values(before)
        with torch.no_grad():
            following = self.values(self._tensor(step.observations)).masked_fill(step.terminated.to(self.device), 0.0)
            target = step.rewards.to(values) + self.hparams["gamma"] * following
            delta = target - values
        loss = 0.5 * (target - values).square().mean() - (delta * log_policy.gather(1, action).squeeze(1)).mean()
        return {"loss": loss, "action": action.squeeze(1), "reward": delta, "done": done}

    def on_train_epoch_end(self) -> None:
        """Log ``train_return``, if an episode ended on any device."""
        here = torch.tensor([sum(self._returns), len(self._returns)], dtype=torch.float32, device=self.device)
        total, number = self.trainer.strategy.reduce(here, reduce_op="sum")
        if number > 0:
            self.log("train_return", total / number, prog_bar=True, sync_dist=True)
        self._returns.clear()

    @torch.no_grad()
    def mean_return(self, seeds: Tensor) -> Tensor:
        """Mean return of the episodes that begin from these seeds, under sampled actions, a float without a graph.

        Args:
            seeds: Integers of at least 0, shape (B,).

        Raises:
            ValueError: They have another shape or type, there are none, or one is negative.
        """
        check_seeds(seeds)
        noise = torch.Generator().manual_seed(int(seeds[0]))

        def scores(observations: Any) -> Tensor:
            # Gumbel's trick: with such noise, the highest score is a draw from the softmax.
            logits: Tensor = self(self._tensor(observations)).float().cpu()
            return logits - torch.empty_like(logits).exponential_(generator=noise).log()

        return self.episodes.returns(seeds.tolist(), scores).mean().to(self.device)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log ``val_return``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log ``test_return``."""
        self._evaluate(batch, "test")

    def _evaluate(self, seeds: Tensor, stage: str) -> None:
        log = functools.partial(self.log, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        log(f"{stage}_return", self.mean_return(seeds), batch_size=len(seeds))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer with two groups: the actor's parameters, and the critic's."""
        kind = torch.optim.SGD if self.hparams["optimizer"] == "sgd" else torch.optim.Adam
        lr, critic_lr = self.hparams["lr"], self.hparams["critic_lr"]
        critic = {"params": list(self.critic.parameters()), "lr": lr if critic_lr is None else critic_lr}
        return kind([{"params": list(self.actor.parameters()), "lr": lr}, critic], lr=lr)


class OnlineSteps(EpisodeSeeds):
    """Step numbers for training, whose episodes the module holds; seeds of episodes for validation and test.

    Training batches are int64 of shape (1,); batches for validation and test are those of :class:`EpisodeSeeds`.

    Args:
        steps_per_epoch: Training steps per epoch, at least 1, over all devices.
        val_episodes: Episodes of validation, 1 to 1,048,576.
        test_episodes: Episodes of the test, 1 to 1,048,576.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> list(OnlineSteps(3).train_dataloader())
        [tensor([0]), tensor([1]), tensor([2])]
    """

    @checked
    def __init__(
        self,
        steps_per_epoch: PositiveInt = 1000,
        val_episodes: NumEpisodes = 20,
        test_episodes: NumEpisodes = 100,
    ) -> None:
        super().__init__(1, steps_per_epoch, val_episodes, test_episodes)
        self.steps_per_epoch = steps_per_epoch

    def train_dataloader(self) -> DataLoader[Any]:
        """The numbers of the steps, one per batch."""
        return DataLoader(SeedDataset(0, self.steps_per_epoch), batch_size=1, collate_fn=pass_through)
