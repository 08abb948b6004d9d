"""Parts of ``reversible.py``: existing models made reversible, and whole trainings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from reversible_meters import Row, blocks, measured, peak, ratio, rounds, step
from torch import nn

from lightning_bpfree.demos.data import DigitsDataModule
from lightning_bpfree.methods.reversible_recompute.conversion import convert_to_reversible
from lightning_bpfree.methods.reversible_recompute.recomputation import SCHEDULES, Schedule
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential

STEPS = 200


class Output(nn.Module):
    """What a model of transformers makes of an input, as a tensor.

    Args:
        model: the model.
        shape: of its input.
        vocabulary: how many tokens there are; 0 for images.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], vocabulary: int = 0) -> None:
        super().__init__()
        self.model = model
        self.x = torch.randint(0, vocabulary, shape) if vocabulary else torch.randn(shape)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        out = self.model(self.x)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def models() -> dict[str, tuple[Output, str | None, str]]:
    """Small models with random weights: each with what is done with its norms, and a description."""
    import transformers

    layer = nn.TransformerEncoderLayer(128, 4, 512, 0.1, F.gelu, batch_first=True, norm_first=True)
    torch_encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    sizes = {"hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 512}
    vit = transformers.ViTConfig(**sizes, image_size=64, patch_size=8)
    roberta = transformers.RobertaConfig(**sizes, vocab_size=1000, max_position_embeddings=130, use_cache=False)
    swin = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=64, depths=[6, 6], num_heads=[2, 4], window_size=4
    )
    return {
        "nn.TransformerEncoder": (Output(torch_encoder, (8, 64, 128)), None, "12 layers of 128, 8 x 64 tokens, dropout 0.1"),
        "ViT": (Output(transformers.ViTModel(vit), (8, 3, 64, 64)), None, "12 layers of 128, 8 x 65 tokens"),
        "Swin": (Output(transformers.SwinModel(swin), (4, 3, 64, 64)), None, "2 stages of 6 layers of 64 and 128, 4 x 256 and 4 x 64 tokens, stochastic depth"),
        "RoBERTa": (Output(transformers.RobertaModel(roberta), (8, 64), 1000), "pre_norm", "12 layers of 128, 8 x 64 tokens, dropout 0.1"),
    }  # fmt: skip


def converted() -> list[Row]:
    """A step of converted models, and the bytes alive in it, over plain autograd."""
    rows = []
    for name, (net, rewire, size) in models().items():
        x = torch.zeros(1, requires_grad=True)  # the models have inputs of their own
        conversion = convert_to_reversible(net, rewire=rewire, warn=False)

        def scheduled(schedule: Schedule, run, stacks=conversion.stacks) -> object:
            for stack in stacks:
                stack.schedule = schedule
            return run()

        run = step(net, x)
        runs = {s: lambda s=s, run=run, at=scheduled: at(s, run) for s in SCHEDULES}
        found = rounds(runs, repeats=8)
        most = {s: scheduled(s, lambda net=net, x=x: peak(net, x)) for s in SCHEDULES}
        base = f"over plain autograd of the converted model, {size}"
        for schedule in SCHEDULES[1:]:
            value, paired = ratio(found, schedule)
            what = f"forward and backward {base} ({min(found['autograd']) * 1000:.0f} ms); {paired}"
            rows.append(measured(f"{name}, step, {schedule}", what, value))
            what = f"most bytes alive {base} ({most['autograd'] / 2**20:.1f} MiB), without parameters and the sums of their gradients"
            rows.append(measured(f"{name}, peak memory, {schedule}", what, most[schedule] / most["autograd"]))
    return rows


class SmallViT(nn.Module):
    """Digits as eight patches of 2 x 4 pixels, six blocks of width 32."""

    def __init__(self, schedule: Schedule, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
        self.positions = nn.Parameter(0.02 * torch.randn(8, 32))
        self.body, self.norm = ReversibleSequential(blocks(6, dropout, 32), schedule), nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = F.unfold(x, (2, 4), stride=(2, 4)).transpose(1, 2)
        return self.head(self.norm(self.body(self.embed(patches) + self.positions)).mean(1))


def losses(schedule: Schedule, dtype: torch.dtype, nudge: float = 0.0) -> torch.Tensor:
    """The training loss of every step; ``nudge`` moves the first weights by so much, relatively."""
    torch.manual_seed(0)
    net = SmallViT(schedule).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + nudge)
    data = DigitsDataModule(batch_size=64)
    data.setup()
    images, labels = data.dataset("train").tensors
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    found: list[torch.Tensor] = []
    while len(found) < STEPS:
        for chosen in torch.randperm(len(images), generator=order).split(64)[:-1]:  # the last batch is smaller
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[chosen].to(dtype)), labels[chosen])
            loss.backward()
            optimizer.step()
            found.append(loss.detach().double())
    return torch.stack(found[:STEPS])


def training() -> list[Row]:
    """How far the losses of a training go away from plain autograd's."""
    rows = []
    for dtype in (torch.float32, torch.float64):
        plain = losses("autograd", dtype)
        runs = {schedule: losses(schedule, dtype) for schedule in SCHEDULES[1:]}
        # As far as any two trainings go that differ by one rounding.
        runs["autograd, first weights one rounding away"] = losses("autograd", dtype, torch.finfo(dtype).eps)
        name = str(dtype).removeprefix("torch.")
        for run, found in runs.items():
            off = (found - plain).abs() / plain
            for steps in (50, STEPS):
                what = (
                    f"largest relative difference of the loss from plain autograd's in steps 1 to {steps}: digits, ViT of 6 blocks of 32, "
                    f"AdamW, dropout 0.1 (loss {float(plain[0]):.2f} to {float(plain[steps - 1]):.2f}); training enlarges any rounding"
                )
                rows.append(measured(f"loss difference, {run}, {name}, steps 1 to {steps}", what, float(off[:steps].max()), unit=""))  # fmt: skip
    return rows
