"""Secure sums: exact as integers, off by half a step as numbers, and they show nothing but the sum."""

import itertools

import numpy as np
import pytest

from lightning_bpfree.federated.secure_sum import FixedPoint, Masks, RefusedSumError, stream, unmasked

pytest.importorskip("cryptography")


def group(num, number=1, size=50, seed=0):
    """Return clients, keys, plain words and masked words of a round."""
    clients = {i: Masks(i) for i in range(num)}
    keys = {i: own.public for i, own in clients.items()}
    words = np.random.RandomState(seed).randint(0, 1 << 63, (num, size)).astype(np.uint64)
    masked = {i: own.masked(words[i], number, keys) for i, own in clients.items()}
    return clients, keys, words, masked


@pytest.mark.parametrize("gone", [(), (0,), (4,), (1, 3)])
def test_the_sum_of_masked_words_is_the_sum_of_words(gone):
    clients, keys, words, masked = group(5)
    left = [i for i in range(5) if i not in gone]
    told = {i: clients[i].told_masks(1, left) for i in left}
    total = unmasked({i: masked[i] for i in left}, told, list(keys))
    assert (total == words[left].sum(0)).all()
    # Of one that has dropped out nothing is told but streams that it shares with others, and of the others their own.
    assert all(set(told[i]) == {i, *gone} for i in left)


@pytest.mark.parametrize(("step", "num"), [(2.0**-32, 10), (2.0**-10, 3), (0.5, 1)])
def test_sums_are_off_by_half_a_step_at_most(step, num):
    numbers = np.random.RandomState(0).standard_cauchy((num, 500))
    fixed = FixedPoint(step, num)
    total = fixed.decode(np.sum([fixed.encode(own) for own in numbers], axis=0, dtype=np.uint64))
    assert np.abs(total - numbers.sum(0)).max() <= step / 2 + 1e-9  # and the rounding of float64 sums near 1e3


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, -1e30])
def test_numbers_that_would_wrap_are_refused(bad):
    with pytest.raises(ValueError, match=r"secure sum: .* is beyond .* give a larger step"):
        FixedPoint(2.0**-32, 10).encode([0.0, bad])


def test_the_largest_numbers_do_not_wrap():
    fixed = FixedPoint(2.0**-32, 3)
    with np.errstate(over="ignore"):
        total = sum(fixed.encode([sign * fixed.largest]) for sign in (1, 1, 1))
    assert float(fixed.decode(total)[0]) == pytest.approx(3 * fixed.largest, rel=1e-12)


def test_a_masked_vector_looks_like_noise():
    clients, _, words, masked = group(4, size=4096)
    for i in clients:
        bits = np.unpackbits((masked[i] ^ words[i]).view(np.uint8))
        assert abs(bits.mean() - 0.5) < 4 * 0.5 / len(bits) ** 0.5  # four standard errors
    for one, other in itertools.combinations(masked.values(), 2):
        assert (one != other).all()


def test_one_that_comes_late_stays_hidden():
    """All that is ever told of client 2 are streams that it shares; its own stream, told by nobody, is left over."""
    clients, _, words, masked = group(4)
    told = {i: clients[i].told_masks(1, [0, 1, 3]) for i in (0, 1, 3)}
    rest = masked[2].copy()
    for i in (0, 1, 3):
        mask = stream(told[i][2], len(rest))
        rest = rest + mask if i < 2 else rest - mask  # with the signs of client 2 undone
    assert (rest != words[2]).all()
    with pytest.raises(RefusedSumError, match="other survivors than before"):
        clients[0].told_masks(1, [0, 1, 2, 3])


def test_clients_refuse_what_would_show_their_numbers():
    clients, keys, words, _ = group(4)
    with pytest.raises(RefusedSumError, match="round 1 again: one mask over two vectors"):
        clients[0].masked(words[0], 1, keys)
    with pytest.raises(RefusedSumError, match="keys of 1 clients"):
        clients[0].masked(words[0], 2, {0: keys[0]})
    with pytest.raises(RefusedSumError, match="this client's among them"):
        clients[0].masked(words[0], 2, {0: keys[1], 1: keys[1]})
    for survivors in ([0], [0, 1]):
        with pytest.raises(RefusedSumError, match="fewer than two, or not more than half of 4"):
            clients[0].told_masks(1, survivors)
    with pytest.raises(RefusedSumError, match="this client masked round 1"):
        clients[0].told_masks(2, [0, 1, 2])
    with pytest.raises(RefusedSumError, match="this client masked round 1"):
        clients[0].told_masks(1, [1, 2, 3])


def test_a_survivor_that_does_not_tell_loses_the_round():
    clients, keys, _, masked = group(4)
    told = {i: clients[i].told_masks(1, [0, 1, 2]) for i in (0, 1)}
    with pytest.raises(ValueError, match=r"clients \[2\] sent numbers, and then not their masks: the round is lost"):
        unmasked({i: masked[i] for i in (0, 1, 2)}, told, list(keys))


def test_rounds_and_sessions_have_masks_of_their_own():
    clients, keys, words, masked = group(3)
    assert (clients[0].masked(words[0], 2, keys) != masked[0]).all()
    again = Masks(0, clients[0].private, answered=2)
    assert again.public == keys[0]
    assert (again.masked(words[0], 3, keys) != masked[0]).all()
