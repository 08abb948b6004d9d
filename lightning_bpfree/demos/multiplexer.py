"""The multiplexer, a task that is learned from right or wrong: its data, and a classifier that is scored as a policy.

Barto used it for teams of stochastic units that learn from a shared reward: A. G. Barto, "Learning by
statistical cooperation of self-interested neuron-like computing elements", Human Neurobiology 4, 1985. S. Chung, "MAP
propagation algorithm: faster learning with a team of reinforcement learning agents", NeurIPS 2021, arXiv 2010.07893,
trains networks with 64 and 32 hidden units on it with k = 5, in batches of 128.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveInt, Range, checked
from lightning_bpfree.demos.fresh import Batch, FreshDataModule
from lightning_bpfree.demos.loading.split_loaders import BatchDataset
from lightning_bpfree.demos.modules import Classifier
from lightning_bpfree.training.trainer_attributes import log_every_n_steps

__all__ = ["MultiplexerDataModule", "PolicyClassifier"]

_MOST_ADDRESS_BITS = 12  # 4,108 inputs
_ENUMERABLE = 12  # bits, of which up to 4,096 inputs are made


class MultiplexerDataModule(FreshDataModule):
    """The k-bit multiplexer: the label is the one of 2**k data bits that k address bits point to.

    Batches are pairs: inputs float32 of shape (B, k + 2**k), each number -1 (bit 0) or +1 (bit 1), all inputs equally
    likely; labels int64 of shape (B,), 0 or 1. The first k numbers are the address, most significant bit first; the
    label is bit k + address of the input.

    Training batches are new in every epoch, and ``seed_everything`` determines them. Validation and test are the same
    in every run. If there are at most 12 bits (k up to 3) and at most `eval_samples` inputs, they contain all
    2**(k + 2**k) inputs, in the order of their binary numbers. Otherwise, they contain `eval_samples` random inputs
    each, different ones for validation and test.

    Args:
        k: Address bits, 1 to 12.
        batch_size: Samples per training batch, at least 1.
        batches_per_epoch: Training batches per epoch, at least 1, over all devices.
        eval_samples: Samples for validation, and for the test, if not all inputs are used; at least 1.

    Attributes:
        num_features: k + 2**k.
        num_classes: 2.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> data = MultiplexerDataModule(k=2, batch_size=5)
        >>> x, y = next(iter(data.train_dataloader()))
        >>> tuple(x.shape), tuple(y.shape)
        ((5, 6), (5,))
        >>> data.label(torch.tensor([[1, -1, -1, -1, 1, -1]]))  # the address is 2, which is the third data bit
        tensor([1])
    """

    num_classes: int = 2

    @checked
    def __init__(
        self,
        k: Annotated[int, Range(ge=1, le=_MOST_ADDRESS_BITS)] = 3,
        batch_size: PositiveInt = 32,
        batches_per_epoch: PositiveInt = 500,
        eval_samples: PositiveInt = 4096,
    ) -> None:
        super().__init__(batch_size, batches_per_epoch, eval_samples)
        self.k, self.num_features = k, k + 2**k

    def label(self, inputs: Tensor) -> Tensor:
        """The bit that the address points to, int64 of shape (B,), of inputs of shape (B, k + 2**k).

        Raises:
            ValueError: The inputs have another shape.
        """
        if inputs.dim() != 2 or inputs.shape[1] != self.num_features:
            raise ValueError(
                f"inputs have shape {tuple(inputs.shape)}; with k={self.k}, give {('B', self.num_features)}."
            )
        return torch.from_numpy(self._label((inputs > 0).cpu().numpy())).to(inputs.device)

    def _label(self, bits: np.ndarray) -> np.ndarray:
        address = bits[:, : self.k] @ (1 << np.arange(self.k)[::-1])
        labels: np.ndarray = bits[np.arange(len(bits)), self.k + address].astype(np.int64)
        return labels

    def _batch(self, bits: np.ndarray) -> Batch:
        return torch.from_numpy(bits).float() * 2 - 1, torch.from_numpy(self._label(bits))

    def draw(self, num: int, state: np.random.RandomState) -> Batch:
        """The given number of inputs, uniform and independent, and their labels."""
        return self._batch(state.randint(0, 2, (num, self.num_features), dtype=np.uint8))

    def dataset(self, split: Literal["val", "test"]) -> BatchDataset:
        """The inputs and labels of validation or test."""
        bits = self.num_features
        if bits > _ENUMERABLE or self.eval_samples < 2**bits:
            return super().dataset(split)
        numbers, places = np.arange(2**bits), np.arange(bits)[::-1]
        return BatchDataset(*self._batch((numbers[:, None] >> places & 1).astype(np.uint8)))


class PolicyClassifier(Classifier):
    """A classifier scored as a policy that samples a class from its probabilities: +1 if it is right, else -1.

    In addition to the metrics of :class:`Classifier`, it logs ``val_reward`` and ``test_reward``, in [-1, 1]: the mean
    over samples of ``2 * softmax(logits)[label] - 1``, the expected reward of this policy. No action is drawn, so the
    only noise is the network's own. In training it logs less than that class, since online learning takes many small
    steps: ``train_loss`` and ``train_reward`` of single batches, every ``log_every_n_steps`` of the Trainer.
    Arguments and errors are those of :class:`Classifier`.

    Example:
        >>> from lightning_bpfree.demos.modules import MLP
        >>> policy = PolicyClassifier(MLP(6, [16], 2), num_classes=2, lr=0.1)
        >>> policy.expected_reward(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), torch.tensor([1, 0]))
        tensor([0., 1.])
    """

    @staticmethod
    def expected_reward(logits: Tensor, labels: Tensor) -> Tensor:
        """Expected reward of each sample, shape (B,), from logits (B, num_classes) and labels int64 (B,)."""
        right = torch.softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return 2 * right - 1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, label smoothing included."""
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y, label_smoothing=self.hparams["label_smoothing"])
        every = log_every_n_steps(self.trainer)
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log("train_loss", loss.detach())
            self.log("train_reward", self.expected_reward(logits.detach(), y).mean(), prog_bar=True)
        return loss

    def _also_logged(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"reward": self.expected_reward(logits, labels).mean()}
