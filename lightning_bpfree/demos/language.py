"""Masked language modeling with any network from tokens to logits."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.arguments import AtLeastTwo, check_arguments
from lightning_bpfree.demos.masking import IGNORED, VOCABULARY
from lightning_bpfree.demos.modules import Classifier

__all__ = ["LanguageModel"]


class LanguageModel(Classifier):
    """Cross-entropy of the predicted tokens, with any network.

    Batches are pairs, both int64 of shape (B, T): tokens, and labels in [0, vocab_size), or -100 at positions that are
    not predicted. Logs ``train_loss`` of single batches, every ``log_every_n_steps`` of the Trainer; as means over all
    predicted positions of the epoch, ``val_loss`` and ``val_acc``, ``test_loss`` and ``test_acc``, accuracies in
    [0, 1]. Losses are in nats; the chance level is ``log(vocab_size)``.

    Args:
        net: Network from tokens (B, T) to logits (B, T, vocab_size).
        vocab_size: Number of tokens, at least 2.
        **kwargs: Arguments of :class:`Classifier`: optimizer, learning rate and its schedule.

    Raises:
        ValueError: An argument is out of range; from the first batch, if logits and labels are incompatible, or no
            position has a label.

    Example:
        >>> import torch
        >>> model = LanguageModel(nn.Embedding(129, 129), lr=0.1)
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 129])
    """

    def __init__(self, net: nn.Module, vocab_size: AtLeastTwo = VOCABULARY, **kwargs: Any) -> None:
        check_arguments(LanguageModel, locals())
        super().__init__(net, vocab_size, **kwargs)
        self.hparams.pop("num_classes", None)  # load_from_checkpoint would give it to this class
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, T, vocab_size), of tokens of shape (B, T)."""
        return super().forward(x)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, label_smoothing: float = 0.0) -> Tensor:
        tokens, labels = batch
        logits = self(tokens)
        if logits.shape[:-1] != labels.shape or logits.shape[-1] != self.vocab_size:
            raise ValueError(
                f"net gives logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)} and "
                f"vocab_size={self.vocab_size}; give a net with logits (B, T, vocab_size)."
            )
        predicted = labels != IGNORED
        logits, labels = logits[predicted], labels[predicted]
        if not len(labels):
            raise ValueError(f"all labels of the batch are {IGNORED}: there is nothing to predict; mask some tokens.")
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if stage == "train":
            self.log("train_loss", loss.detach(), prog_bar=True)
            return loss
        accuracy = getattr(self, f"{stage}_acc")
        accuracy.update(logits.detach(), labels)
        log = functools.partial(self.log, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        log(f"{stage}_loss", loss.detach(), sync_dist=True)
        log(f"{stage}_acc", accuracy)
        return loss
