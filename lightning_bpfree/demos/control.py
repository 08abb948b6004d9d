"""A task without derivatives: the reward of episodes in a simulated world, as a LightningModule and its data.

`ControlModule` is an ordinary LightningModule whose training step returns a number without a graph; `EpisodeSeeds`
makes batches of episodes. Rules that only evaluate the training step can train it; backprop cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_bpfree.core.arguments import Name, PositiveFloat, PositiveInt, Range, check_arguments, checked
from lightning_bpfree.demos.episodes import Episodes, check_seeds
from lightning_bpfree.demos.loading.split_loaders import pass_through

__all__ = ["ControlModule", "EpisodeSeeds"]

_SEEDS = 1 << 20  # seeds set apart for testing, and as many for validation; training has those from twice that on
_TRAINING_SEEDS = 1 << 30
NumEpisodes = Annotated[int, Range(ge=1, le=_SEEDS)]
_EVAL_BATCH = 100  # episodes at once in validation and test


class ControlModule(LightningModule):
    """A policy for a gymnasium environment; its training step returns the mean return of a batch of episodes.

    Batches are seeds of episodes, int64 of shape (B,), as :class:`EpisodeSeeds` makes them; the B episodes run at once.
    Equal seeds and parameters give equal returns. Logs, as means over the epoch, ``train_return``, ``val_return`` and
    ``test_return``.

    **Backprop cannot train this module**: the world is simulated outside of torch, actions are chosen by argmax, and
    the returned number has no graph. Rules that only evaluate the training step can. The returned number is a reward,
    so the rule must maximize it: ``EvolutionStrategy(..., maximize=True)``.

    Args:
        net: Network from observations (B, ...) to scores: one for each numbered action, of which the highest is chosen,
            or one for each coordinate of an action in a box, scaled to its range by tanh.
        env_id: Id of a registered environment, such as ``CartPole-v1`` (4 observed numbers, 2 actions) or
            ``Pendulum-v1`` (3 observed numbers, 1 coordinate).
        lr: Learning rate, above 0.
        optimizer: ``sgd`` or ``adam``; ``sgd`` with a learning rate of 1 applies the rule's step unchanged.
        max_steps: Steps after which an episode ends; None for the environment's own limit.

    Raises:
        ModuleNotFoundError: gymnasium is not installed.
        ValueError: An argument is out of range, or the kind of environment is not supported; from the first batch, if
            the output of `net` does not fit the actions.

    Example:
        >>> from lightning_bpfree.demos.modules import MLP
        >>> model = ControlModule(MLP(4, [16], 2, "tanh"), "CartPole-v1", max_steps=20)
        >>> model.mean_return(torch.arange(3)) <= 20
        tensor(True)
    """

    def __init__(
        self,
        net: nn.Module,
        env_id: Name = "CartPole-v1",
        lr: PositiveFloat = 0.01,
        optimizer: Literal["sgd", "adam"] = "adam",
        max_steps: PositiveInt | None = None,
    ) -> None:
        check_arguments(ControlModule, locals())
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        self.episodes = Episodes(env_id, max_steps)

    def forward(self, observations: Tensor) -> Tensor:
        """Scores of the actions, shape (B, scores)."""
        scores: Tensor = self.net(observations)
        return scores

    def mean_return(self, seeds: Tensor) -> Tensor:
        """Mean return of the episodes that begin from these seeds, a float without a graph.

        Args:
            seeds: Integers of at least 0, shape (B,).

        Raises:
            ValueError: They have another shape or type, there are none, or one is negative.
        """
        check_seeds(seeds)
        return self.episodes.returns(seeds.tolist(), self.scores).mean().to(self.device)

    def scores(self, observations: Any) -> Tensor:
        """Scores of the actions for an array of observations, in the network's precision, shape (B, scores)."""
        like = next(self.parameters(), torch.empty(0))
        scores: Tensor = self(torch.as_tensor(observations).to(like))
        return scores

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean return of the batch: a reward, to be maximized."""
        return self._step(batch, "train")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log ``val_return``."""
        self._step(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log ``test_return``."""
        self._step(batch, "test")

    def _step(self, seeds: Tensor, stage: str) -> Tensor:
        value = self.mean_return(seeds)
        log = functools.partial(self.log, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        log(f"{stage}_return", value, batch_size=len(seeds))
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        kind = torch.optim.SGD if self.hparams["optimizer"] == "sgd" else torch.optim.Adam
        return kind(self.parameters(), lr=self.hparams["lr"])


class SeedDataset(Dataset[Tensor]):
    """Consecutive seeds, which a DataLoader indexes a batch at a time.

    Args:
        first: The first seed.
        num: Number of seeds.

    Example:
        >>> SeedDataset(100, 5).__getitems__([0, 3])
        tensor([100, 103])
    """

    def __init__(self, first: int, num: int) -> None:
        self.first, self.num = first, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.first + index)

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.first + torch.tensor(indices)


class FreshSampler(Sampler[int]):
    """Indices drawn in each epoch, with torch's global generator.

    Used instead of torch's RandomSampler, which Lightning replaces on several devices by one that visits all seeds.

    Args:
        num: Indices per epoch.
        bound: Indices are less than this.
    """

    def __init__(self, num: int, bound: int) -> None:
        self.num, self.bound = num, bound

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[int]:
        yield from torch.randint(self.bound, (self.num,)).tolist()


class EpisodeSeeds(LightningDataModule):
    """Seeds of episodes: training batches of new ones in every epoch, fixed ones for validation and test.

    Batches are int64 of shape (B,). Seeds for training, validation and test are disjoint. ``seed_everything``
    completely determines the seeds for training.

    Args:
        batch_size: Episodes per training batch, at least 1.
        batches_per_epoch: Training batches per epoch, at least 1.
        val_episodes: Episodes of validation, 1 to 1,048,576.
        test_episodes: Episodes of the test, 1 to 1,048,576.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> data = EpisodeSeeds(batch_size=4, batches_per_epoch=3, test_episodes=2)
        >>> [tuple(seeds.shape) for seeds in data.train_dataloader()]
        [(4,), (4,), (4,)]
        >>> list(data.test_dataloader())
        [tensor([0, 1])]
    """

    @checked
    def __init__(
        self,
        batch_size: PositiveInt = 8,
        batches_per_epoch: PositiveInt = 10,
        val_episodes: NumEpisodes = 20,
        test_episodes: NumEpisodes = 100,
    ) -> None:
        super().__init__()
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.val_episodes, self.test_episodes = val_episodes, test_episodes

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches of seeds that are new in each epoch."""
        return DataLoader(
            SeedDataset(2 * _SEEDS, _TRAINING_SEEDS),
            batch_size=self.batch_size,
            sampler=FreshSampler(self.batch_size * self.batches_per_epoch, _TRAINING_SEEDS),
            collate_fn=pass_through,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The seeds of validation, always the same."""
        return DataLoader(SeedDataset(_SEEDS, self.val_episodes), batch_size=_EVAL_BATCH, collate_fn=pass_through)

    def test_dataloader(self) -> DataLoader[Any]:
        """The seeds of the test, always the same."""
        return DataLoader(SeedDataset(0, self.test_episodes), batch_size=_EVAL_BATCH, collate_fn=pass_through)
