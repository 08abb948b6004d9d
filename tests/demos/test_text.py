"""The corpus is cut and split by document; masks are BERT's, and decided by seed, epoch and sequence alone."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import fitted
from torch import Tensor, nn

from lightning_bpfree.demos.masking import IGNORED, MASK, EpochSampler, MaskedSequences, masked
from lightning_bpfree.demos.text import MODULES, StandardLibraryTextDataModule, read_docstrings, split_of
from lightning_bpfree.methods.backprop.rule import Backprop

pytestmark = pytest.mark.slow  # reads the standard library again and again

SPLITS = ("train", "val", "test")


def ready(**settings: Any) -> StandardLibraryTextDataModule:
    data = StandardLibraryTextDataModule(**{"max_sequences": 50, "batch_size": 8, **settings})
    data.setup()
    return data


def unmasked(inputs: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels == IGNORED, inputs, labels)


# --- text ---


def small_library(folder: Path) -> Path:
    (folder / "one.py").write_text(
        '"""One.\n\n    Indented."""\nclass A:\n    """A."""\n    def f(self):\n        "f"\n'
        'if True:\n    async def g():\n        """g na\u00efve"""\n    def no(): return "none"\nx = """none"""\n'
        'raise RuntimeError("this module is never imported")\n',
        encoding="utf-8",
    )
    (folder / "two" / "deeper").mkdir(parents=True)
    for name in ("b", "__init__", "deeper/c"):
        (folder / "two" / f"{name}.py").write_text(f'"""{name}"""')
    return folder


def test_docstrings_come_in_the_order_of_the_source_and_nothing_is_imported(tmp_path: Path) -> None:
    small_library(tmp_path)
    assert read_docstrings("one", tmp_path) == "One.\n\nIndented.\n\nA.\n\nf\n\ng na?ve"
    assert read_docstrings("two", tmp_path) == "__init__\n\nb"


def test_sequences_are_the_text_cut_and_every_document_is_in_one_split() -> None:
    data, folder = ready(max_sequences=None), Path(sysconfig.get_paths()["stdlib"])
    for split in SPLITS:
        rows = data.sequences(split)
        assert (rows.dtype, rows.shape[1]) == (torch.int64, 64)
        assert int(rows.max()) < MASK
        want = ""
        for module in MODULES:
            if split_of(module) == split:
                text = read_docstrings(module, folder)
                want += text[: len(text) // 64 * 64]
        assert bytes(rows.flatten().tolist()).decode() == want


def test_every_split_has_its_share() -> None:
    sizes = {split: len(ready(max_sequences=None).sequences(split)) for split in SPLITS}
    # Python 3.10 to 3.13 differ by about one per cent of the text.
    assert sizes["train"] / sum(sizes.values()) == pytest.approx(0.81, abs=0.03)
    assert sizes["val"] / sum(sizes.values()) == pytest.approx(0.115, abs=0.03)
    assert list(MODULES) == sorted(set(MODULES))


def test_max_sequences_takes_some_from_all_over_the_text_and_no_seed_moves_them() -> None:
    whole, some = ready(max_sequences=None), ready(max_sequences=20)
    for split in SPLITS:
        all_rows, rows = whole.sequences(split), some.sequences(split)
        places = [-1]  # some sequences occur twice, hence each is looked for behind the last
        for row in rows:
            behind = places[-1] + 1
            places.append(behind + int((all_rows[behind:] == row).all(1).nonzero()[0]))
        assert len(rows) == 20
        assert places[-1] - places[1] > len(all_rows) / 2
        assert torch.equal(ready(max_sequences=20, seed=1).sequences(split), rows)
        assert torch.equal(ready(max_sequences=10**6).sequences(split), all_rows)


# --- masks ---


@pytest.mark.parametrize(("share", "length", "num"), [(0.15, 64, 10), (0.15, 20, 3), (0.5, 9, 4), (1.0, 7, 7)])
def test_each_sequence_has_the_same_number_of_labels_and_they_are_the_true_characters(
    share: float, length: int, num: int
) -> None:
    tokens = torch.randint(32, 127, (30, length))
    inputs, labels = masked(tokens, share, np.random.RandomState(0))
    assert (labels != IGNORED).sum(1).tolist() == [num] * 30
    assert torch.equal(unmasked(inputs, labels), tokens)  # hence inputs differ at labeled positions only
    assert inputs.dtype == labels.dtype == torch.int64


def test_of_the_chosen_ones_eight_tenths_are_masked_a_tenth_is_random_and_a_tenth_stays() -> None:
    rows, num = 4000, 10
    tokens = torch.full((rows, 64), 10)  # a line's end, which no random character is
    inputs, labels = masked(tokens, 0.15, np.random.RandomState(0))
    chosen = inputs[labels != IGNORED]
    assert len(chosen) == rows * num
    random = chosen[(chosen != MASK) & (chosen != 10)]
    for found, share in ((chosen == MASK, 0.8), (chosen == 10, 0.1)):
        # five standard errors of a mean over 40,000 independent draws
        assert float(found.float().mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / 40_000) ** 0.5)
    assert set(random.tolist()) == set(range(32, 127))
    # positions are uniform: each is chosen 625 times, give or take five standard deviations
    assert (labels != IGNORED).sum(0).sub(rows * num / 64).abs().max() < 5 * (rows * 0.16 * 0.84) ** 0.5


# --- batches ---


def epoch_of(data: StandardLibraryTextDataModule, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [tuple(batch) for batch in loader]


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def test_an_epoch_has_every_sequence_once() -> None:
    data = ready()
    batches = epoch_of(data, 3)
    assert [len(tokens) for tokens, _ in batches] == [8] * 6 + [2]
    seen = torch.cat([unmasked(*batch) for batch in batches])
    assert sorted(seen.tolist()) == sorted(data.sequences("train").tolist())
    assert not torch.equal(seen, data.sequences("train"))


def test_seed_and_epoch_decide_order_and_masks_and_nothing_else_does() -> None:
    first = epoch_of(ready(), 2)
    torch.manual_seed(1)
    np.random.seed(1)
    assert same(epoch_of(ready(), 2), first)
    other_size = epoch_of(ready(batch_size=5), 2)
    assert torch.equal(torch.cat([x for x, _ in other_size]), torch.cat([x for x, _ in first]))
    for other in (epoch_of(ready(), 1), epoch_of(ready(seed=1), 2)):
        assert not same(other, first)


def test_a_sequence_is_masked_anew_in_each_epoch() -> None:
    data = MaskedSequences(torch.full((3, 64), 65), 0.15, seed=0)
    assert torch.equal(data[1][1], data[1][1])
    assert not torch.equal(data[1][1], data[2][1])
    assert not torch.equal(data[1][1], data[4][1])  # the same sequence, one epoch later
    assert torch.equal(data[1][0], data[1][0])


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_is_always_the_same(split: Any) -> None:
    batches = list(getattr(ready(seed=5), f"{split}_dataloader")())
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    want = ready().dataset(split).tensors
    assert torch.equal(inputs, want[0])
    assert torch.equal(labels, want[1])
    assert torch.equal(unmasked(inputs, labels), ready().sequences(split))


def test_ranks_share_out_an_epoch() -> None:
    drawn = []
    for rank in (0, 1):
        sampler = DistributedSamplerWrapper(EpochSampler(10, 0), num_replicas=2, rank=rank, shuffle=False)
        sampler.set_epoch(2)
        drawn.append(list(sampler))
    assert sorted(drawn[0] + drawn[1]) == list(range(20, 30))


def test_workers_give_the_same_batches() -> None:
    assert same(epoch_of(ready(num_workers=1)), epoch_of(ready()))


class Counting(LightningModule):
    """Keeps what it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(tuple(batch))
        return self.net(batch[0].float().mean().reshape(1)).sum() * 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_a_run_resumed_after_an_epoch_meets_the_same_batches(tmp_path: Path) -> None:
    def run(seed: int, **settings: Any) -> list[tuple[Tensor, Tensor]]:
        seed_everything(seed, verbose=False)
        module, saving = Counting(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fitted(module, ready(), Backprop(), saving, max_epochs=3, enable_checkpointing=True, **settings)
        return module.seen

    whole = run(3)
    assert same(whole, [batch for epoch in range(3) for batch in epoch_of(ready(), epoch)])
    resumed = run(4, ckpt_path=tmp_path / "epoch=0.ckpt")  # the global seed does not matter
    assert same(resumed, whole[7:])


def test_a_loader_begins_at_the_epoch_of_its_trainer() -> None:
    # Workers begin before a resumed Trainer sets the epoch.
    data = ready()
    data.trainer = type("Stub", (), {"current_epoch": 4})()  # type: ignore[assignment]
    loader: Any = data.train_dataloader()
    assert loader.sampler.epoch == 4


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0: give"),
        ({"batch_size": 0}, "batch_size=0: give"),
        ({"max_sequences": 0}, "max_sequences=0: give"),
        ({"num_workers": -1}, "num_workers=-1: give"),
        ({"mask_share": 0.0}, "mask_share=0.0: give"),
        ({"mask_share": 1.1}, "mask_share=1.1: give"),
        ({"mask_share": float("nan")}, "mask_share=nan: give"),
        ({"mask_share": 0.15, "sequence_length": 3}, "mask_share is 0.15.*at least one of the 3 positions"),
        ({"seed": -1}, "seed=-1: give"),
        ({"seed": 1 << 32}, "seed=4294967296: give"),
        ({"sequence_length": 50_000}, r"sequence_length is 50000, longer.*give at most \d+\."),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_the_cure(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**settings)


def test_the_longest_sequence_that_is_named_fits() -> None:
    with pytest.raises(ValueError, match="give at most") as caught:
        ready(sequence_length=10**6)
    most = int(str(caught.value).split()[-1].rstrip("."))
    assert all(len(ready(sequence_length=most).sequences(split)) for split in SPLITS)
    with pytest.raises(ValueError, match="give at most"):
        ready(sequence_length=most + 1)


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base64.pyc").write_bytes(b"")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"module 'base64' in .*Use a Python with its \.py files"):
        ready()


def test_reading_before_setup_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        StandardLibraryTextDataModule().train_dataloader()
