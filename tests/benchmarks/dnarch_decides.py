"""What decides the sizes of the study's residual network, the task or the budget?

    python tests/benchmarks/dnarch_decides.py --out docs/results/dnarch_decides.json

The same searches as in the study: as they are, on shuffled labels, without the loss's gradient of the sizes, and with
a hundredth of the budget's weight. Noted are the sizes, the ratio of the two gradients' norms, and the cost that the
search reached before one factor met the rest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import warnings
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch
from dnarch_study import EPOCHS, UserResNet, fashion, fit, score

import lightning_bpfree as bpf
from lightning_bpfree.functional import count_macs
from lightning_bpfree.methods.learnable_architecture.sizes.cost import deviation

ARMS = ("as in the study", "shuffled labels", "no gradient of the loss", "weight=0.1")
SHARES = (0.5, 0.25)
DIMS = {"W": ("width",), "W+D": ("width", "depth")}


class Gradients(pl.Callback):
    """Compares the two gradients of the sizes before each step, and takes that of the loss away if told so."""

    def __init__(self, of: bpf.LearnableArchitecture, without: bool) -> None:
        self.of, self.without, self.ratios, self.reached = of, without, [], 1.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        search = self.of.search
        if search.fixed:
            return
        self.reached = search.over_budget
        with torch.enable_grad():
            term = search.weight * deviation(search.cost, search.target)
            budget = torch.autograd.grad(term, search.parameters, allow_unused=True)
        norms = []
        for gradients in ([p.grad for p in search.parameters], budget):
            norms.append(float(torch.stack([g for g in gradients if g is not None]).norm()))
        if norms[1] > 0:
            self.ratios.append(norms[0] / norms[1])
        if self.without:
            for parameter in search.parameters:
                parameter.grad = torch.zeros_like(parameter)


def run(arm, share, dims, seed, train, test):
    pl.seed_everything(seed, verbose=False)
    net, example = UserResNet(), train[0][:1]
    weight = {"weight": 0.1} if arm == "weight=0.1" else {}
    callback = bpf.LearnableArchitecture(
        share, DIMS[dims], network="net", example_inputs=example, pictures=False, fix_at=0.5, **weight
    )
    gradients = Gradients(callback, arm == "no gradient of the loss")  # before the callback, which adds the budget's
    if arm == "shuffled labels":
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
        train = train[0], train[1][order]
    fit(net, train, EPOCHS["pruning"], 0.01, seed, callbacks=[gradients, callback])
    exported = callback.export().network
    return {
        "arm": arm, "share": share, "dims": dims, "seed": seed, "sizes": callback.sizes, "reached": gradients.reached,
        "ratio": statistics.median(gradients.ratios), "score": score(exported, test, False),
        "of_reference": count_macs(exported, example) / callback._budget.reference,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train, test = fashion(2000)
    found = {
        "command": "python tests/benchmarks/dnarch_decides.py --out docs/results/dnarch_decides.json",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "seeds": options.seeds,
        "runs": [],
    }
    for share in SHARES:
        for dims in DIMS:
            for arm in ARMS:
                for seed in options.seeds:
                    found["runs"].append(run(arm, share, dims, seed, train, test))
                    print({k: v for k, v in found["runs"][-1].items() if k != "sizes"}, flush=True)
                    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
