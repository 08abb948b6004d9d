"""The portable generator: known answers, the same numbers however they are asked for, and unit moments."""

import hashlib

import numpy as np
import pytest
import torch

from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.random_numbers.philox import Philox, philox, philox_on_cpu

LIKE = {"w": torch.zeros(7, 9), "b": torch.zeros(9), "s": torch.zeros(()), "z": torch.zeros(3, dtype=torch.complex64)}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # of Random123, the authors' own library; the counter's upper 64 bits are zero here
        (0, (0, 0), ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
    ],
)
def test_known_answers(counter, key, words):
    found = philox(torch.tensor([counter]), torch.tensor([key])).flatten().tolist()
    assert [f"{word:08x}" for word in found] == words
    found = philox_on_cpu(counter, 1, np.array([key], dtype=np.uint64)).flatten().tolist()
    assert [f"{word:08x}" for word in found] == words


def plain_philox(counter, key):
    """Philox4x32-10 in Python's own integers, written from the paper."""
    x, (k0, k1), mask = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(p1 >> 32) ^ x[1] ^ k0, p1 & mask, (p0 >> 32) ^ x[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return x


def test_equals_a_plain_implementation():
    counters, keys = [0, 1, 12345, (1 << 40) + 3], [(0, 1), (0xFFFFFFFF, 0xDEADBEEF)]
    found = philox(torch.tensor(counters), torch.tensor(keys))
    assert found.tolist() == [[plain_philox(c, k) for c in counters] for k in keys]


@pytest.mark.parametrize("keys", [[(0, 1)], [(0xFFFFFFFF, 0xDEADBEEF), (5, 7), (0xFFFFFFFF, 0xFFFFFFFF)]])
@pytest.mark.parametrize("first", [0, 12345, (1 << 32) - 10])
def test_numpy_makes_the_words_of_torch(first, keys):
    found = philox_on_cpu(first, 9, np.array(keys, dtype=np.uint64))
    assert found.tolist() == philox(torch.arange(first, first + 9), torch.tensor(keys)).tolist()
    assert found[0, 8].tolist() == plain_philox(first + 8, keys[0])


def test_counters_beyond_32_bits():
    stream, first = Philox([3 + (9 << 32)], "gaussian", 5), (1 << 32) - 2
    stream.skip(8 * first)
    numbers = stream.fill(torch.empty(1, 40))[0]
    table = Philox([3 + (9 << 32)], "gaussian", 5)
    words = [word for counter in range(first, first + 5) for word in plain_philox(counter, (3, 9))]
    ranks = torch.tensor([half for word in words for half in (word & 0xFFFF, word >> 16)])
    assert torch.equal(numbers.argsort(), ranks.argsort())  # the table is increasing
    assert table.fill(torch.empty(1, 40)).ne(numbers).any()


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_pieces_do_not_change_the_stream(kind):
    whole = Philox([3], kind, 1000).fill(torch.empty(1, 1000))[0]
    other = Philox([9, 3], kind, 5)  # another stream beside it, and fewer numbers expected
    parts = [other.fill(torch.empty(2, n))[1] for n in (1, 7, 200, 792)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_stack_moved_and_combine_agree(kind):
    directions = Directions(LIKE, 5, 2, kind, "portable")
    stack, params = directions.stack(range(5)), {name: torch.ones_like(like) for name, like in LIKE.items()}
    for k in range(5):
        moved = directions.moved(k, params, 0.5)
        for name in LIKE:
            assert torch.equal(directions[k][name], stack[name][k])
            assert torch.equal(moved[name], stack[name][k].mul(0.5).add(params[name]))
    combined = directions.combine([0.0, 2.0, 0.0, -1.0, 0.0])
    for name in LIKE:
        torch.testing.assert_close(combined[name], 2 * stack[name][1] - stack[name][3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [9, 3000, 9000])  # small modules' directions are drawn several at a time
def test_the_order_of_drawing_does_not_change_a_direction(size):
    like = {"w": torch.zeros(size), "b": torch.zeros(5, dtype=torch.float64)}
    stack, directions = (
        Directions(like, 8, 2, generator="portable").stack(range(8)),
        Directions(like, 8, 2, generator="portable"),
    )
    for k in (0, 1, 2, 7, 3, 3, 4, 0):
        for name in like:
            assert torch.equal(directions.part(k, name), stack[name][k])
        drawn = directions[k]
        drawn["w"].zero_()  # is the caller's own
        assert torch.equal(directions[k]["w"], stack["w"][k])
        assert torch.equal(directions.moved(k, like, 1.0)["b"], stack["b"][k])
    with pytest.raises(IndexError, match="direction 8 of 8"):
        directions[8]


def test_moments_and_independence():
    v = Directions({"w": torch.zeros(200_000)}, 2, 0, "gaussian", "portable").stack([0, 1])["w"].double()
    assert abs(float(v[0].mean())) < 4 / 200_000**0.5  # four standard errors
    assert abs(float(v[0].square().mean()) - 1) < 4 * (2 / 200_000) ** 0.5
    assert abs(float(v[0].pow(4).mean()) - 3) < 4 * (96 / 200_000) ** 0.5 + 0.01  # the table ends at 4.3: 2.99
    assert abs(float((v[0] * v[1]).mean())) < 4 / 200_000**0.5
    for lag in (1, 2, 8):
        assert abs(float((v[0, lag:] * v[0, :-lag]).mean())) < 4 / 200_000**0.5


def test_the_bits_are_those_of_every_machine():
    """Written down once: whoever gets other numbers cannot be in a federation with others."""
    directions = Directions({"w": torch.zeros(1000)}, 3, 5, "gaussian", "portable").stack(range(3))["w"]
    assert hashlib.sha256(directions.numpy().astype("<f4").tobytes()).hexdigest()[:16] == "d07d4bf623421915"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree():
    cpu, cuda = ({"w": torch.zeros(10_000, device=device)} for device in ("cpu", "cuda"))
    one, two = (Directions(like, 2, 5, "gaussian", "portable")[1]["w"] for like in (cpu, cuda))
    assert torch.equal(one, two.cpu())
