"""Random streams in checkpoints: Lightning saves none, so dropout and shuffling would differ after a resume."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_bpfree.core.replay.random_streams import RandomStreams


class SavedStreams:
    """The global random streams of all ranks, as a callback saves and restores them.

    The callback calls :meth:`to_plain` in ``state_dict``, :meth:`of_all_ranks` in ``on_save_checkpoint``,
    :meth:`take` in ``load_state_dict``, and :meth:`on_fit_start` and :meth:`on_train_batch_start` in the hooks of
    the same names.
    """

    def __init__(self) -> None:
        self.streams = RandomStreams()
        self._resumed: list[dict[str, Any]] = []  # of a checkpoint, by rank

    def watch(self, device: torch.device | str | int) -> None:
        """Save the stream of a CUDA device too."""
        self.streams = RandomStreams([torch.device(device)])

    def to_plain(self) -> list[dict[str, Any]]:
        """Return this rank's streams in tensors, lists and numbers."""
        return [self.streams.to_plain()]

    def of_all_ranks(self, trainer: pl.Trainer, mine: list[Any]) -> list[Any]:
        """Return the lists of all ranks in order; after an interruption, only this rank's."""
        # After an exception on one rank, the others do not get here.
        if trainer.world_size == 1 or trainer.interrupted or not torch.distributed.is_initialized():
            return mine
        gathered: list[list[Any]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(gathered, mine)
        return [part for parts in gathered for part in parts]

    def take(self, streams: list[dict[str, Any]]) -> None:
        """Keep the streams of a checkpoint, to restore when the fit starts."""
        self._resumed = streams

    def on_fit_start(self, trainer: pl.Trainer) -> None:
        """Restore the streams before the data loaders draw their sample order."""
        if trainer.global_rank < len(self._resumed):
            self.streams.from_plain(self._resumed[trainer.global_rank])

    def on_train_batch_start(self, trainer: pl.Trainer, batch_idx: int) -> None:
        """Restore the streams again inside an epoch, after the loader has drawn its sample order."""
        if self._resumed and batch_idx > 0:
            self.on_fit_start(trainer)
        self._resumed = []
