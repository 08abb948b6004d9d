"""Two processes: equal crops, equal weights, also where a block is left out; and the budget's gradient counts once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import outcomes, run_ranks

CASES = {
    "backprop": (False, ("width", "depth"), 0.25),
    "depth": (False, ("depth",), 0.7),  # what one block fewer costs: without widths, a block has to go
    "rule": (True, ("width",), 0.5),
}


def train(case: str, out: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from searched_networks import Module, ResNet, loader, search, trainer

    import lightning_bpfree as bpf

    rule, dims, budget = CASES[case]
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.manual_seed(rank)  # ranks draw different numbers; rank 0's weights are those of all
    callback = search(budget, dims, network="net", lr=0.02, weight=30.0)
    rules = [bpf.Backprop()] if rule else []
    module = Module(ResNet())
    trainer(*rules, callback, max_epochs=4, devices=2, strategy="ddp").fit(module, loader(1, 8, 8))
    state = callback.search.state_dict()
    depth = [size for name, size in callback.sizes.items() if name.startswith("depth")]
    torch.save(
        {
            "weights": dict(module.state_dict()),
            "sizes": torch.tensor(list(state["sizes"].values()), dtype=torch.float64),
            "crops": torch.tensor(list(callback.sizes.values())),
            "depth": torch.tensor(depth),
            "over_budget": torch.tensor(callback.cost_over_budget),
        },
        out / f"{case}.rank{rank}.pt",
    )


@pytest.mark.slow  # processes that import torch and lightning
@pytest.mark.xdist_group("two_processes")
@pytest.mark.parametrize("case", CASES)
def test_ranks_have_equal_crops(case, tmp_path):
    run_ranks(__file__, case, tmp_path, 240)
    one, two = outcomes(tmp_path, case)
    assert torch.equal(one["sizes"], two["sizes"])
    assert torch.equal(one["crops"], two["crops"])
    statistics = ("running_mean", "running_var")  # BatchNorm's own on each rank, as in plain DDP
    for name, weight in one["weights"].items():
        assert torch.equal(weight, two["weights"][name]) or name.endswith(statistics), name
    assert float(one["over_budget"]) == pytest.approx(1, abs=0.05)
    if case == "depth":
        assert int(one["depth"].sum()) < 3  # a block was left out, whose parameters got no gradient of the loss


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]))
