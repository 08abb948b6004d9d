"""What learned sizes are worth: an ablation of dimensions under one budget, and a user's CNN made smaller.

    python tests/benchmarks/dnarch_study.py OUT.json [--parts pruning sequence dense image] [--peers FOLDER] [--seeds 0 1 2]

Runs that OUT.json has already are not repeated, so that an interrupted study goes on where it was.
FOLDER is what `pip install --no-deps --target FOLDER torch-pruning==1.6.1` has made; without it the peer is left out.
Every arm trains the same number of epochs in all, with the same optimizer and schedule. Accuracies are those of the
exported network on test data, costs those that `torch.utils.flop_counter` counts on it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.demos.data import FashionMNISTDataModule
from lightning_bpfree.functional import count_macs

ABLATION = {
    "K": ("kernel",),
    "K+R": ("kernel", "resolution"),
    "K+R+W": ("kernel", "resolution", "width"),
    "K+R+W+D": ("kernel", "resolution", "width", "depth"),
}
SHARE = 0.7  # of the multiply-accumulates of the network without resolutions, uncropped


class Task(pl.LightningModule):
    """A network, its loss and AdamW with a cosine schedule over the steps that are left."""

    def __init__(self, net, dense, lr, steps) -> None:
        super().__init__()
        self.net, self.dense, self.lr, self.steps = net, dense, lr, steps

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        out = self(batch[0])
        return F.mse_loss(out, batch[1]) if self.dense else F.cross_entropy(out, batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps, pct_start=0.15)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(net, data, epochs, lr, seed, dense=False, callbacks=()):
    """Train for some epochs; returns CPU seconds."""
    pl.seed_everything(seed, verbose=False)
    loader = DataLoader(TensorDataset(*data), 64, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(Task(net, dense, lr, epochs * len(loader)), loader)
    return time.process_time() - start


@torch.no_grad()
def score(net, data, dense):
    net.eval()
    out = torch.cat([net(x) for x in data[0].split(250)])
    return float(F.mse_loss(out, data[1])) if dense else float((out.argmax(1) == data[1]).float().mean())


def digits(kind):
    found = load_digits()
    x, y = torch.tensor(found.images).float()[:, None] / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    if kind == "dense":  # denoising: the clean image from one with noise
        noisy = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        return (noisy[:1300], x[:1300]), (noisy[1300:], x[1300:])
    x = ((x - x.mean()) / x.std()).flatten(2)
    return (x[:1300], y[:1300]), (x[1300:], y[1300:])


def fashion(rows):
    data = FashionMNISTDataModule(download=False)
    x, y, test_x, test_y = data.load()

    def images(z):
        return F.avg_pool2d(z.reshape(-1, 1, 28, 28).float() / 255, 2) * 3 - 1

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows]
    return (images(x[order]), y[order].long()), (images(test_x[:3000]), test_y[:3000].long())


def ccnn(kind, crops):
    if kind == "sequence":
        return bpf.CCNN((1, 64), 10, width=16, blocks=3, omega=3.0, crops=crops)
    if kind == "dense":
        return bpf.CCNN((1, 8, 8), 1, width=12, blocks=3, omega=3.0, dense=True, crops=crops)
    return bpf.CCNN((1, 14, 14), 10, width=12, blocks=3, max_kernel=9, omega=3.0, crops=crops)


def full_macs(net, example):
    """Return the multiply-accumulates with all taps of all kernels."""
    for module in net.modules():
        if isinstance(module, bpf.ContinuousConv):
            for axis in module.kernel_axes:
                axis.set_crop(axis.count)
    return count_macs(net, example)


EPOCHS = {"sequence": 12, "dense": 12, "image": 8, "pruning": 8}


class Rows:
    """The runs of one part, written after each."""

    def __init__(self, found, part, save, **about) -> None:
        self.kept = found.setdefault(part, {"runs": []})
        self.kept |= {"epochs": EPOCHS[part], **about}
        self.part, self.save = part, save

    def has(self, **key):
        return any(all(run[name] == value for name, value in key.items()) for run in self.kept["runs"])

    def add(self, row) -> None:
        self.kept["runs"].append(row)
        print(self.part, {k: v for k, v in row.items() if k not in ("history", "sizes")}, flush=True)
        self.save()


def ablation(kind, seed, found, save):
    """Train one network with more and more learned dimensions under one budget, and the reference that is not cropped."""
    train, test = fashion(2000) if kind == "image" else digits(kind)
    dense, epochs, lr = kind == "dense", EPOCHS[kind], 0.005
    example = train[0][:1]
    full = full_macs(ccnn(kind, crops=False), example)
    rows = Rows(found, kind, save, budget=SHARE * full, full=full)
    for arm in (*ABLATION, "reference"):
        if rows.has(arm=arm, seed=seed):
            continue
        pl.seed_everything(seed, verbose=False)
        net = ccnn(kind, crops="R" in arm and arm != "reference")
        if arm == "reference":
            seconds = fit(net, train, epochs, lr, seed, dense)
            row = {"score": score(net, test, dense), "macs": count_macs(net, example)}
            rows.add({"arm": arm, "seed": seed, "cpu_seconds": round(seconds, 2), **row})
            continue
        callback = bpf.LearnableArchitecture(
            SHARE * full, ABLATION[arm], relative=False, network="net", example_inputs=example, pictures=False
        )
        seconds = fit(net, train, epochs, lr, seed, dense, [callback])
        exported, some = callback.export(), test[0][:100]
        with torch.no_grad():
            off = float((net.eval()(some) - exported.network(some)).abs().max())
        rows.add({
            "arm": arm, "seed": seed, "cpu_seconds": round(seconds, 2), "score": score(exported.network, test, dense),
            "macs": exported.macs, "of_budget": exported.macs / (SHARE * full), "params": exported.params,
            "export_error": off, "sizes": callback.sizes,
            "history": [{**h, "shares": {k: round(v, 3) for k, v in h["shares"].items()}} for h in callback.search.history[::8]],
        })  # fmt: skip


class Block(nn.Module):
    def __init__(self, a, b, stride) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.act = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride > 1 or a != b:
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x):
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(out + self.shortcut(x))


class UserResNet(nn.Module):
    """A residual network as users write them; it knows nothing of masks."""

    def __init__(self, widths=(10, 20, 40)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Sequential(nn.Conv2d(1, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(Block(i, o, s), Block(o, o, 1)) for i, o, s in ((a, a, 1), (a, b, 2), (b, c, 2))
        )
        self.head = nn.Linear(c, 10)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def uniform(share, example):
    """Return the network whose widths are scaled by one factor, the nearest in multiply-accumulates."""
    full = count_macs(UserResNet(), example)
    found = []
    for steps in range(8, 41):
        widths = tuple(max(1, round(w * steps / 40)) for w in (10, 20, 40))
        found.append((abs(count_macs(UserResNet(widths), example) / full - share), widths))
    return UserResNet(min(found)[1])


def pruned(net, share, example, peers):
    """Prune a trained network by torch-pruning, to a share of its multiply-accumulates."""
    sys.path.insert(0, str(peers))
    import torch_pruning as tp

    full = count_macs(net, example)
    pruner = tp.pruner.BasePruner(
        net, example, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True, pruning_ratio=0.95,
        iterative_steps=400, ignored_layers=[net.head], max_pruning_ratio=0.95,
    )  # fmt: skip
    while count_macs(net, example) > 1.01 * share * full:
        pruner.step()
    sys.path.remove(str(peers))
    return net


def pruning(seed, found, save, peers):
    """Make a user's CNN smaller: learned widths, uniform widths, and training-pruning-fine-tuning by a peer."""
    train, test = fashion(2000)
    example, epochs, lr = train[0][:1], EPOCHS["pruning"], 0.01
    full = count_macs(UserResNet(), example)
    rows = Rows(found, "pruning", save, full=full)

    def run(arm, share):
        pl.seed_everything(seed, verbose=False)
        net, more = UserResNet(), {}
        if arm.startswith("learned"):
            dims = ("width", "depth") if arm.endswith("D") else ("width",)
            callback = bpf.LearnableArchitecture(
                share, dims, network="net", example_inputs=example, pictures=False, fix_at=0.5
            )
            seconds = fit(net, train, epochs, lr, seed, callbacks=[callback])
            with torch.no_grad():
                masked = net.eval()(test[0][:100])
            net, more = callback.export().network, {"sizes": callback.sizes}
            with torch.no_grad():
                more["export_error"] = float((masked - net(test[0][:100])).abs().max())
        elif arm == "torch-pruning":
            seconds = fit(net, train, epochs // 2, lr, seed)
            net = pruned(net, share, example, peers)
            seconds += fit(net, train, epochs - epochs // 2, lr, seed)
        else:
            net = uniform(share, example) if arm == "uniform" else net
            seconds = fit(net, train, epochs, lr, seed)
        row = {"arm": arm, "share": share, "seed": seed, "score": score(net, test, False)}
        row |= {"macs": count_macs(net, example), "of_reference": count_macs(net, example) / full}
        rows.add(row | {"params": sum(p.numel() for p in net.parameters()), "cpu_seconds": round(seconds, 2), **more})

    arms = [("reference", 1.0)]
    arms += [(arm, share) for share in (0.5, 0.25) for arm in ("learned W", "uniform", "torch-pruning", "learned W+D")]
    for arm, share in arms:
        if not rows.has(arm=arm, share=share, seed=seed) and (peers or arm != "torch-pruning"):
            run(arm, share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", default=["pruning", "sequence", "dense", "image"])
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {
        "command": "python tests/benchmarks/dnarch_study.py docs/results/dnarch_accuracy.json --peers FOLDER",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__, "torch-pruning": "1.6.1"},
        "seeds": options.seeds,
    }

    def save() -> None:
        options.out.write_text(json.dumps(found, indent=1))

    for seed in options.seeds:  # outermost: an interrupted study has all arms of some seeds
        for part in options.parts:
            if part == "pruning":
                pruning(seed, found, save, options.peers)
            else:
                ablation(part, seed, found, save)


if __name__ == "__main__":
    main()
