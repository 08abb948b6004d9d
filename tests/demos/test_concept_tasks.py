"""Data, labels and networks of the concept recipes: shapes, labels that are known by construction, seeds."""

from __future__ import annotations

import pytest
import torch

from lightning_bpfree.demos.concept_tasks import concepts, tictactoe
from lightning_bpfree.demos.concept_tasks.autoencoder import Autoencoder
from lightning_bpfree.demos.concept_tasks.next_byte import ByteGRU, NextByteDataModule, QuotedWindows

EMPTY, MINE, THEIRS = 0, 1, 2


def board(rows: str) -> torch.Tensor:
    """Return planes (1, 3, 3, 3) of a drawing: x is mine, o is theirs."""
    squares = torch.tensor([".xo".index(letter) for letter in rows.replace("/", "")])
    return torch.nn.functional.one_hot(squares, 3).T.reshape(1, 3, 3, 3).float()


# --- tic-tac-toe ---


@pytest.mark.parametrize(
    ("drawing", "win", "defend", "center", "allowed", "broken"),
    [
        (".../.../...", False, False, False, True, 0),
        ("xx./.o./.o.", True, False, False, True, 0),  # their column is closed by one of mine
        ("xxo/.../o..", False, True, False, True, 0),  # their diagonal runs through the empty center
        ("x../.x./oo.", True, True, True, True, 0),
        ("xx./.../...", True, False, False, False, 2),  # two stones too many of mine
        ("oo./.../...", False, True, False, False, 1),
        ("ooo/xx./...", True, False, True, False, 1),  # the game is over
        ("xxx/ooo/...", False, False, False, False, 2),
    ],
)
def test_positions_with_known_truth(drawing, win, defend, center, allowed, broken):
    planes = board(drawing)
    assert bool(tictactoe.win_in_one(planes)) == win
    assert bool(tictactoe.must_defend(planes)) == defend
    assert bool(tictactoe.center_is_mine(planes)) == center
    assert bool(tictactoe.legal(planes)) == allowed
    assert float(tictactoe.broken_rules(planes)) == broken


def test_every_position_is_legal_and_keeps_the_rules():
    data = tictactoe.TicTacToeDataModule()
    data.setup()
    planes = torch.cat([data.dataset(split).tensors[0] for split in ("train", "val", "test")])
    values = torch.cat([data.dataset(split).tensors[1] for split in ("train", "val", "test")])
    assert planes.shape == (4520, 3, 3, 3)
    assert (planes.sum(1) == 1).all()
    assert tictactoe.legal(planes).all()
    assert not tictactoe.broken_rules(planes).any()
    assert len({tuple(row) for row in planes.flatten(1).int().tolist()}) == 4520
    assert (values[tictactoe.win_in_one(planes)] == 2).all()  # who can complete a line, wins
    empty = (planes[:, EMPTY].flatten(1).sum(1) == 9).nonzero()
    assert values[empty].item() == 1  # perfect play is a draw


def test_broken_rules_have_a_slope_that_mends_them():
    planes = board("oo./.../...").requires_grad_()
    tictactoe.broken_rules(planes).sum().backward()
    assert (planes.grad[:, THEIRS] > 0).all()  # fewer of theirs, more of mine
    assert (planes.grad[:, MINE] < 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_of_the_board_are_a_function_of_the_seed(seed):
    first, again, other = (tictactoe.TicTacToeDataModule(seed=s) for s in (seed, seed, seed + 1))
    for data in (first, again, other):
        data.setup()
    assert torch.equal(first.dataset("test").tensors[0], again.dataset("test").tensors[0])
    assert not torch.equal(first.dataset("test").tensors[0], other.dataset("test").tensors[0])
    with pytest.raises(RuntimeError, match=r"holds no data yet; call prepare_data\(\) and setup\(\)"):
        tictactoe.TicTacToeDataModule().train_dataloader()


# --- text ---


def test_windows_follow_each_other_and_splits_share_no_text():
    data = NextByteDataModule(sequence_length=32, batch_size=8, max_sequences=50)
    data.setup()
    tokens, following = next(iter(data.val_dataloader()))
    assert tokens.shape == following.shape == (8, 32)
    assert torch.equal(tokens[:, 1:], following[:, :-1])
    assert tokens.max() < data.vocab_size
    again = NextByteDataModule(sequence_length=32, max_sequences=50)
    again.setup()
    assert torch.equal(data.dataset("train").tensors[0], again.dataset("train").tensors[0])
    rows = [{bytes(row) for row in data.dataset(split).tensors[0].tolist()} for split in ("train", "val", "test")]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]


def test_quoted_windows_begin_outside_of_a_quotation():
    found = QuotedWindows(sequence_length=24, batch_size=64)
    tokens = torch.cat([tokens for tokens, _ in found])
    assert tokens.shape[1] == 24
    assert (tokens == ord('"')).any(1).all()
    text = 'one "two three four five six" seven eight nine ten eleven twelve thirteen\n\nno marks in here at all'
    cut = NextByteDataModule(sequence_length=24, quoted=True)._cut(text)
    windows = [bytes(row.tolist()).decode() for row in cut]
    assert windows, "some of this text"
    for window in windows:
        start = text.index(window)
        assert text[:start].count('"') % 2 == 0
        assert '"' in window[:-1]


def test_the_network_has_a_state_for_every_position():
    torch.manual_seed(0)
    net, tokens = ByteGRU(16, 4, 5), torch.randint(0, 16, (2, 7))
    logits = net(tokens)
    assert logits.shape == (2, 7, 16)
    later = tokens.clone()
    later[:, 4:] = 0
    assert torch.equal(net(later)[:, :4], logits[:, :4])  # no position sees what follows it


# --- images and labels ---


def test_loops_are_closed_by_strokes_and_opened_by_gaps():
    ring = torch.zeros(1, 1, 6, 6)
    ring[..., 1:5, 1:5] = 1.0
    ring[..., 2:4, 2:4] = 0.0
    assert bool(concepts.closed_loop(ring))
    gap = ring.clone()
    gap[..., 1, 2:4] = 0.0
    assert not bool(concepts.closed_loop(gap))
    assert bool(concepts.closed_loop(5 * ring - 3))  # the scale of the pixels does not matter
    both = torch.cat([ring, gap])
    assert concepts.closed_loop(both).tolist() == [True, False]


def test_slant_and_ink_of_strokes():
    upright = torch.zeros(1, 1, 9, 9)
    upright[..., 4] = 1.0
    assert float(concepts.slant(upright)) == pytest.approx(0.0, abs=1e-6)
    assert float(concepts.ink(upright)) == pytest.approx(1 / 9)
    lean = torch.eye(9).flip(0)[None, None]
    assert float(concepts.slant(lean)) == pytest.approx(-float(concepts.slant(lean.flip(3))))


def test_sleeves_hang_down_at_the_sides_of_tops():
    shirt = torch.zeros(3, 1, 28, 28)
    shirt[:, :, 4:26, 9:19] = 1.0
    shirt[1:, :, 6:24, 2:6] = 1.0
    shirt[1:, :, 6:24, 22:26] = 1.0
    labels = concepts.long_sleeves(shirt, torch.tensor([0, 2, 7]))  # T-shirt, pullover, sneaker
    assert labels[:2].tolist() == [0.0, 1.0]
    assert labels[2].isnan()
    assert not concepts.long_sleeves(shirt).isnan().any()


def test_labels_of_targets_texts_and_tables():
    assert concepts.even_digit(torch.zeros(3, 1), torch.tensor([0, 1, 2])).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="even_digit looks at the labels"):
        concepts.even_digit(torch.zeros(1, 1), None)
    texts = torch.tensor([list(b'a "b"'), list(b'a "b ')])
    assert concepts.inside_quotation(texts).tolist() == [False, True]
    table = torch.tensor([[0.5, -1.0], [-0.5, 1.0]])
    assert concepts.feature_above_mean(1)(table).tolist() == [False, True]
    with pytest.raises(ValueError, match="feature=2: the table has 2 columns"):
        concepts.feature_above_mean(2)(table)
    with pytest.raises(ValueError, match="feature=-1: give a whole number of at least 0"):
        concepts.feature_above_mean(-1)


def test_an_autoencoder_is_a_function_of_its_seed_and_learns_a_plane():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (Autoencoder((4,), latent=2, hidden=16, epochs=60, seed=s) for s in (0, 0, 1))
    basis = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    x = torch.randn(128, 2, generator=torch.Generator().manual_seed(2)) @ basis
    untrained = float((first(x) - x).square().mean().detach())
    for model in (first, again, other):
        model.fit(x)
    assert torch.equal(torch.get_rng_state(), before), "the global stream stays where it was"
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    assert float((first(x) - x).square().mean().detach()) < 0.1 * untrained  # two latents hold a plane
