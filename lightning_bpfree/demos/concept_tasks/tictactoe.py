"""The complete game of tic-tac-toe: every position, its value under perfect play, and exactly known concepts."""

from __future__ import annotations

import functools
from typing import Annotated

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveInt, Range, checked
from lightning_bpfree.demos.in_memory import stratified_split
from lightning_bpfree.demos.loading.split_loaders import BatchDataset, SplitLoaders

__all__ = ["TicTacToeDataModule", "broken_rules", "center_is_mine", "legal", "must_defend", "win_in_one"]

_LINES = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])
_EMPTY, _MINE, _THEIRS = 0, 1, 2
_Board = tuple[int, ...]


@functools.cache
def _value(board: _Board) -> int:
    """0, 1 or 2: the side to move loses, draws or wins under perfect play."""
    if any(all(board[i] == _THEIRS for i in line) for line in _LINES.tolist()):
        return 0
    after = _moves(board)
    return max((2 - _value(next_board) for next_board in after), default=1)


def _moves(board: _Board) -> list[_Board]:
    """The positions after each move, from the view of the other side."""
    turned = [(_EMPTY, _THEIRS, _MINE)[square] for square in board]
    return [(*turned[:i], _THEIRS, *turned[i + 1 :]) for i, square in enumerate(board) if square == _EMPTY]


@functools.cache
def _all_positions() -> tuple[Tensor, Tensor]:
    """Boards to be played on, as one-hot planes (N, 3, 3, 3), and their values (N,)."""
    seen: dict[_Board, int] = {}
    waiting: list[_Board] = [(_EMPTY,) * 9]
    while waiting:
        board = waiting.pop()
        lost = any(all(board[i] == _THEIRS for i in line) for line in _LINES.tolist())
        if board in seen or lost or _EMPTY not in board:
            continue
        seen[board] = _value(board)
        waiting += _moves(board)
    boards = torch.tensor(sorted(seen))
    planes = torch.nn.functional.one_hot(boards, 3).movedim(2, 1).reshape(-1, 3, 3, 3).float()
    return planes, torch.tensor([seen[tuple(board)] for board in boards.tolist()])


def _can_complete(inputs: Tensor, plane: int) -> Tensor:
    """Whether some line has two stones of a plane and an empty square, booleans (B,)."""
    squares = inputs.flatten(2)[:, :, _LINES.to(inputs.device)].sum(3)  # (B, planes, lines)
    return ((squares[:, plane] == 2) & (squares[:, _EMPTY] == 1)).any(1)


def win_in_one(inputs: Tensor, _targets: Tensor | None = None) -> Tensor:
    """Whether the side to move can complete a line in one move, booleans (B,), for planes (B, 3, 3, 3)."""
    return _can_complete(inputs, _MINE)


def must_defend(inputs: Tensor, _targets: Tensor | None = None) -> Tensor:
    """Whether the other side threatens to complete a line, booleans (B,)."""
    return _can_complete(inputs, _THEIRS)


def center_is_mine(inputs: Tensor, _targets: Tensor | None = None) -> Tensor:
    """Whether the side to move holds the center, booleans (B,)."""
    return inputs[:, _MINE, 1, 1] == 1


def legal(inputs: Tensor) -> Tensor:
    """Whether a position can occur in a game that continues, booleans (B,), for planes (B, 3, 3, 3).

    Example:
        >>> empty = torch.zeros(1, 3, 3, 3).index_fill_(1, torch.tensor(0), 1.0)
        >>> legal(empty)
        tensor([True])
    """
    counts = inputs.flatten(2).sum(2)
    lead = counts[:, _THEIRS] - counts[:, _MINE]  # the side to move has as many stones, or one less
    complete = inputs.flatten(2)[:, 1:, _LINES.to(inputs.device)].prod(3).amax((1, 2)) > 0
    return ((lead == 0) | (lead == 1)) & ~complete & (counts[:, _EMPTY] > 0)


def broken_rules(inputs: Tensor) -> Tensor:
    """By how much a position breaks the rules, (B,), differentiable, for planes (B, 3, 3, 3).

    The number of extra or missing stones, plus complete lines. It is 0 for :func:`legal` positions, and for full boards
    without a line.

    Example:
        >>> two_of_mine = torch.zeros(1, 3, 3, 3).index_fill_(1, torch.tensor(0), 1.0)
        >>> two_of_mine[0, 0, 0, :2], two_of_mine[0, 1, 0, :2] = 0.0, 1.0
        >>> broken_rules(two_of_mine)
        tensor([2.])
    """
    counts = inputs.flatten(2).sum(2)
    lead = counts[:, _THEIRS] - counts[:, _MINE]
    lines = inputs.flatten(2)[:, 1:, _LINES.to(inputs.device)].prod(3).sum((1, 2))
    return (-lead).relu() + (lead - 1).relu() + lines


class TicTacToeDataModule(SplitLoaders, LightningDataModule):
    """All 4,520 positions of tic-tac-toe with a possible move, and their values.

    Batches are pairs: one-hot planes float32, (B, 3, 3, 3), for empty squares, stones of the side to move and stones of
    the other side; labels int64, (B,): 0, 1 or 2 if the side to move loses, draws or wins under perfect play.

    Args:
        batch_size: Positions per batch, at least 1.
        held_out: Share of the positions for validation, and another for the test; in (0, 0.5).
        seed: Seed of the split.

    Example:
        >>> data = TicTacToeDataModule()
        >>> data.setup()
        >>> sum(len(data.dataset(split)) for split in ("train", "val", "test"))
        4520
    """

    num_classes: int = 3

    @checked
    def __init__(
        self, batch_size: PositiveInt = 64, held_out: Annotated[float, Range(gt=0, lt=0.5)] = 0.2, seed: int = 0
    ) -> None:
        super().__init__()
        self.batch_size, self.held_out, self.seed = batch_size, held_out, seed
        self._splits: dict[str, BatchDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Enumerate the game; later calls do nothing."""
        if self._splits:
            return
        planes, values = _all_positions()
        rest, test = stratified_split(values, self.held_out, self.seed)
        train, val = stratified_split(values[rest], self.held_out / (1 - self.held_out), self.seed)
        parts = {"train": rest[train], "val": rest[val], "test": test}
        self._splits = {name: BatchDataset(planes[rows], values[rows]) for name, rows in parts.items()}
