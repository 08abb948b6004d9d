"""What rules suggest for networks in blocks works, and what hardly works is warned of."""

from __future__ import annotations

import ast
import re

import pytest
import torch
import torch.nn.functional as F
from foreign_networks import CLASSES, Called, Dicts, OwnLoss, bert, images, rules, texts, vit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_bpfree as bpf


class Convolutions(nn.Module):
    """No chain that shows its order, with two of them inside."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.features(pixel_values))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(30, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Scores(OwnLoss):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch = dict(batch)
        labels = batch.pop("labels")
        output = self.net(**batch)
        return F.cross_entropy(getattr(output, "logits", output), labels)


SUGGESTED = {
    "convolutions": (Convolutions, images),
    "words": (Words, texts),
    "bert": (bert, texts),
    "vit": (vit, images),
}


@pytest.mark.parametrize("net", SUGGESTED)
@pytest.mark.parametrize("rule", ["goodness", "local"])
def test_the_suggested_blocks_work(net: str, rule: str) -> None:
    """What the message says is written into the call, and trains all but the layer of the output."""
    make, loader = SUGGESTED[net]
    module = Scores(make())
    given = rules(1)[rule]
    with pytest.raises(MisconfigurationException, match=r"name its blocks by patterns, such as blocks=\[") as refused:
        fitted(module, loader(), given, limit_val_batches=0)
    fitted(module, loader(), bpf.Backprop(), limit_val_batches=0)  # nothing was left behind
    said = re.search(r"such as blocks=(\[.*?\]), in the order", str(refused.value))
    assert said is not None
    blocks = ast.literal_eval(said[1])
    module = Scores(make())
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    fitted(module, loader(), rules(blocks)[rule], limit_val_batches=0)
    moved = {name for name, p in module.net.named_parameters() if not torch.equal(p, before[name])}
    named = [name for block in blocks for name in ([block] if isinstance(block, str) else block)]
    for name in named:
        if any(p.dim() > 1 for p in module.net.get_submodule(name).parameters()):
            assert any(other.startswith(name) for other in moved), name
    assert not {"head", "classifier"} & set(named)  # what makes the output is no block


def test_labels_written_over_the_input_of_a_convolution_are_warned_of() -> None:
    module = Scores(Convolutions())
    blocks = [["features.0", "features.1", "features.2"], ["features.3", "features.4"]]
    with pytest.warns(UserWarning, match="label='overlay'.*Pass label='embedding'"):
        fitted(module, images(), bpf.ForwardForward(blocks, num_classes=CLASSES), limit_val_batches=0)
    rule = bpf.ForwardForward(blocks, label="embedding", num_classes=CLASSES)
    fitted(Scores(Convolutions()), images(), rule, limit_val_batches=0)


def test_a_team_at_chance_is_told_once_what_to_try() -> None:
    drawn = torch.randn(600, 6, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(Dicts("x", drawn, "label"), batch_size=100)  # labels do not depend on the inputs

    class Still(Called):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Still(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, CLASSES)))
    with pytest.warns(UserWarning, match="chance is 25.0%. Try another learning rate") as heard:
        fitted(module, loader, bpf.TeamReinforce(seed=1), limit_val_batches=0, max_epochs=3)
    assert len([w for w in heard if "chance is" in str(w.message)]) == 1
