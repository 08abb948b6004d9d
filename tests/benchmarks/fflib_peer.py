"""Measures Forward-Forward beside the library fflib, and beside backprop: test error, time of a step and of a prediction.

pip install -c constraints.txt -e '.[recipes]'
pip install fflib==0.3.0 --no-deps
python tests/benchmarks/fflib_peer.py --out docs/results/fflib_benchmarks.json

fflib asks for a torchvision of its time, which only its own data sets need, hence ``--no-deps``; of its other
requirements, tqdm comes with Lightning. It is used as its README and its example for MNIST do: an ``FFNet`` of
``FFLinear``, threshold 20, trained in an ``FFSuite``, read by ``TryAllClasses``, random wrong labels as negatives.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from fflib.nn.ff_linear import FFLinear
from fflib.nn.ff_net import FFNet
from fflib.observers.one_hot import TryAllClasses
from fflib.utils import iff_suite
from fflib.utils.data.dataprocessor import FFDataProcessor
from fflib.utils.ff_logger import logger
from fflib.utils.ff_suite import FFSuite
from local_learning import ruled, with_adam
from run import Classifier, backprop, batch, mlp, plain_forward, row, run_parts, seconds

import lightning_bpfree as bpf
from lightning_bpfree.cli.compare.results import confidence
from lightning_bpfree.demos import modules
from lightning_bpfree.demos.data import DigitsDataModule, FashionMNISTDataModule, InMemoryDataModule

WIDTH, CLASSES = 500, 10
RATES = (0.001, 0.003, 0.01, 0.02)
MORE_RATES = (*RATES, 0.05, 0.1)
SEEDS, TUNING_SEED = (0, 1, 2), 1000


class Processor(FFDataProcessor):
    """What fflib asks of a data set: loaders, and how labels join inputs; as in its own class for MNIST.

    Args:
        data: where the batches come from; None where they are handed over.
        unit: whether pixels are from 0 to 1, as in fflib's example, instead of standardized.
    """

    def __init__(self, data: InMemoryDataModule | None = None, unit: bool = False) -> None:
        self.data, self.ends = data, (0.0, 1.0)
        if data is not None and unit:
            pixels = data.dataset("train").tensors[0]
            self.ends = float(pixels.min()), float(pixels.max())

    def get_train_loader(self) -> Any:
        return self.data.train_dataloader()

    def get_val_loader(self) -> Any:
        return self.data.val_dataloader()

    def get_test_loader(self) -> Any:
        return self.data.test_dataloader()

    def get_all_loaders(self) -> dict[str, Any]:
        return {"train": self.get_train_loader(), "val": self.get_val_loader(), "test": self.get_test_loader()}

    def encode_output(self, y: torch.Tensor) -> torch.Tensor:
        return F.one_hot(y, CLASSES).float()

    def combine_to_input(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        low, high = self.ends
        return torch.cat((x if self.ends == (0.0, 1.0) else (x - low) / (high - low), y), 1)

    def generate_negative(self, x: torch.Tensor, y: torch.Tensor, net: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.encode_output((y + torch.randint(1, CLASSES, y.shape)) % CLASSES)


def fflib_suite(inputs: int, processor: Processor, lr: float = 0.001, threshold: float = 20.0) -> FFSuite:
    """Two layers of fflib, each with an Adam of its own."""
    layers = [FFLinear(size, WIDTH, loss_threshold=threshold, lr=lr) for size in (inputs + CLASSES, WIDTH)]
    net = FFNet(layers, None)
    probe = TryAllClasses(lambda x, y: net(processor.combine_to_input(x, y)), output_classes=CLASSES)
    return FFSuite(net, probe, processor)


Accuracy = Callable[[str], float]  # of a split, "val" or "test"


def train_fflib(data: InMemoryDataModule, epochs: int, lr: float, unit: bool = False, **kwargs: Any) -> Accuracy:
    suite = fflib_suite(data.num_features, Processor(data, unit), lr, **kwargs)
    for _ in range(epochs):
        suite.run_train_epoch(validate=False)
    return lambda split: suite.run_test_epoch(getattr(data, f"{split}_dataloader")())


def train_ours(data: InMemoryDataModule, epochs: int, lr: float, rule: type[pl.Callback], **kwargs: Any) -> Accuracy:
    module = modules.Classifier(modules.MLP(data.num_features, [WIDTH, WIDTH], CLASSES), optimizer="adam", lr=lr)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[rule(**kwargs)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.limit_val_batches = 1.0
    runs = {"val": trainer.validate, "test": trainer.test}
    return lambda split: runs[split](module, datamodule=data, verbose=False)[0][f"{split}_acc"]


@dataclasses.dataclass
class Contender:
    """One row of test errors: how to train, what is fixed, and what is chosen by validation beside the learning rate."""

    name: str
    train: Callable[..., Accuracy]
    note: str
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def options(self) -> Iterator[dict[str, Any]]:
        grid = {"lr": RATES, **self.grid}
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))

    def run(self, data: InMemoryDataModule, epochs: int, seed: int, **chosen: Any) -> Accuracy:
        pl.seed_everything(seed, verbose=False)
        return self.train(data, epochs, **self.fixed, **chosen)

    def measured(
        self, data: InMemoryDataModule, where: str, epochs: int, tuning_epochs: int, seeds: tuple[int, ...] = SEEDS
    ) -> dict[str, object]:
        """Choose on the validation split and a seed of its own, then measure on the test split."""
        options = list(self.options())
        chosen = options[0]
        if len(options) > 1:
            chosen = max(options, key=lambda option: self.run(data, tuning_epochs, TUNING_SEED, **option)("val"))
        errors = [100 * (1 - self.run(data, epochs, seed, **chosen)("test")) for seed in seeds]
        half, each = confidence(errors), ", ".join(f"{error:.2f}" for error in errors)
        interval = "no interval" if half is None else f"± {half:.2f} (95 % interval)"
        spread = f"{interval}, seeds {', '.join(map(str, seeds))}: {each}"
        settings = ", ".join(f"{name} {value}" for name, value in chosen.items())
        if len(options) > 1:
            after = "" if tuning_epochs == epochs else f" after {tuning_epochs} epoch"
            settings += f", best of {len(options)} on the validation split{after}, seed {TUNING_SEED}"
        what = f"{where}, {epochs} epochs; {spread}; {settings}; {self.note}"
        return row(self.name, what, statistics.mean(errors), unit="%")


STANDARD = [
    Contender("backprop, test error", train_ours, "cross-entropy, the last layer is trained too", {"rule": bpf.Backprop}),
    Contender(
        "Forward-Forward, test error", train_ours,
        "defaults: sum of squares over a threshold of 1 a unit, label written over 10 pixels, random wrong labels",
        {"rule": bpf.ForwardForward},
    ),
    Contender(
        "fflib, test error", train_fflib,
        "threshold 20 of its example, on the mean square; label of length 1 behind the standardized pixels, random wrong labels",
    ),
    Contender("fflib, pixels 0 to 1, test error", train_fflib, "the same, pixels as in its example", {"unit": True}),
]  # fmt: skip
TUNED = [
    Contender(
        "Forward-Forward, tuned, test error", train_ours, "temperatures of 1, 10, 22 tried; the rest as by default",
        {"rule": bpf.ForwardForward}, {"lr": MORE_RATES, "temperature": (1.0, 10.0, 22.0)},
    ),
    Contender(
        "fflib, tuned, test error", train_fflib, "thresholds of 0.3, 1, 3 tried; the rest as in its example",
        {}, {"lr": MORE_RATES, "threshold": (0.3, 1.0, 3.0)},
    ),
]  # fmt: skip
LONGER = Contender(
    "fflib, ten times the epochs, test error", train_fflib, "rate and threshold of its example, which need more steps than 30 epochs have",
    {}, {"lr": (0.02,)},
)  # fmt: skip
LOW = Contender(
    "fflib, threshold 1, pixels 0 to 1, test error", train_fflib, "threshold of its own tests, pixels as in its example",
    {"unit": True, "threshold": 1.0},
)  # fmt: skip


def error_on_digits() -> list[dict[str, object]]:
    data = DigitsDataModule(batch_size=64, flatten=True)
    data.setup()
    where = "digits, 64-500-500, Adam, batch 64"
    rows = [one.measured(data, where, 30, 30) for one in [*STANDARD, *TUNED]]
    return [*rows, LONGER.measured(data, where, 300, 300)]


def error_on_fashion() -> list[dict[str, object]]:
    data = FashionMNISTDataModule(batch_size=128, flatten=True)
    data.prepare_data()
    data.setup()
    where = "Fashion-MNIST, 784-500-500, Adam, batch 128"
    rows = [one.measured(data, where, 3, 1, seeds=(0,)) for one in [*STANDARD[:3], LOW]]
    return [{**made, "name": f"{made['name']} on Fashion-MNIST"} for made in rows]


def times() -> list[dict[str, object]]:
    """A step with Adam, and a prediction of a batch, over those of the plain network."""
    data, plain, other = batch(128), Classifier(mlp(WIDTH)), Classifier(mlp(WIDTH))
    plain.log = lambda *a, **k: None  # type: ignore[method-assign]  # there is no Trainer here
    suite = fflib_suite(784, Processor())
    rule = bpf.ForwardForward()
    steps = {
        "forward": plain_forward(plain, data),
        "backprop": with_adam(backprop(plain, data), plain),
        "Forward-Forward": with_adam(ruled(rule, other, data), other),
        "fflib": lambda: suite._train(*data),
    }
    best = seconds(steps, repeats=40)
    notes = {
        "Forward-Forward": "all blocks, then one Adam",
        "fflib": "a layer's step, then its output again by the new weights",
    }
    what = f"with Adam, without a training loop, over backprop with Adam ({best['backprop'] / best['forward']:.2f} forwards), 784-500-500, batch 128; "
    rows = [row(f"{n}, time of a step", what + note, best[n] / best["backprop"]) for n, note in notes.items()]

    def tried() -> None:
        with torch.no_grad():
            suite._test(data[0])

    best = seconds(
        {"forward": steps["forward"], "Forward-Forward": plain_forward(other, data), "fflib": tried}, repeats=40
    )
    notes = {"Forward-Forward": "labels in one batch", "fflib": "a pass a label"}
    what = "over a plain forward pass of 784-500-500-10, 10 labels, batch 128; "
    return [
        *rows,
        *(row(f"{n}, time of a prediction", what + note, best[n] / best["forward"]) for n, note in notes.items()),
    ]


PARTS = {f.__name__: f for f in (times, error_on_digits, error_on_fashion)}


if __name__ == "__main__":
    logger.setLevel(logging.WARNING)
    iff_suite.tqdm = iter  # no progress bars
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    COMMAND = "python tests/benchmarks/fflib_peer.py --out docs/results/fflib_benchmarks.json"
    run_parts(PARTS, COMMAND, __doc__, fflib=importlib.metadata.version("fflib"))
