"""The models of ``reversible_gpu.py``, made of torch's modules and reversible stacks, and the nets of its race test."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleBlock, ReversibleSequential

Data = tuple[torch.Tensor, ...]
SWIN = {"depths": (2, 2, 18, 2)}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "vit": {
        "tiny": {"width": 32, "depth": 2, "heads": 2, "image": 32, "patch": 8},
        "small": {"width": 384, "depth": 12, "heads": 6},
        "base": {"width": 768, "depth": 12, "heads": 12},
        "large": {"width": 1024, "depth": 24, "heads": 16},
    },
    "swin": {
        "tiny": {"width": 32, "depths": (2, 1, 1, 1), "image": 64, "window": 2},
        "small": {"width": 96, **SWIN},
        "base": {"width": 128, **SWIN},
        "large": {"width": 192, **SWIN},
    },
    "roberta": {
        "tiny": {"width": 32, "depth": 2, "heads": 2, "vocabulary": 100, "length": 20},
        "small": {"width": 512, "depth": 8, "heads": 8},
        "base": {"width": 768, "depth": 12, "heads": 12},
        "large": {"width": 1024, "depth": 24, "heads": 16},
    },
}


class Attention(nn.Module):
    """Self-attention of the normalized input, without a skip.

    Args:
        width: channels.
        heads: how many.
        dropout: of weights and output.
        window: side of the windows of images (B, H, W, C); 0 for sequences (B, N, C).
        shift: by so many pixels windows are moved; no mask keeps the edges of an image apart.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, window: int = 0, shift: int = 0) -> None:
        super().__init__()
        self.heads, self.dropout, self.window, self.shift = heads, dropout, window, shift
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        if not self.window:
            return self.drop(self.attend(x))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        _, height, width, channels = x.shape
        side = self.window
        rows, columns = height // side, width // side
        x = x.view(-1, rows, side, columns, side, channels).transpose(2, 3).reshape(-1, side * side, channels)
        x = self.attend(x).view(-1, rows, columns, side, side, channels).transpose(2, 3)
        x = x.reshape(-1, height, width, channels)
        return self.drop(x.roll((self.shift, self.shift), (1, 2)) if self.shift else x)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        many, length, channels = x.shape
        q, k, v = self.qkv(x).view(many, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
        return self.out(out.reshape(many, length, channels))


def stack(width: int, depth: int, heads: int, dropout: float, window: int = 0, shifted: bool = False) -> nn.Module:
    """Transformer layers as one reversible stack; every other one with shifted windows if ``shifted``."""
    made = []
    for index in range(depth):
        shift = window // 2 if shifted and index % 2 else 0
        inner = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))
        feed_forward = nn.Sequential(nn.LayerNorm(width), *inner)
        made.append(ReversibleBlock(Attention(width, heads, dropout, window, shift), feed_forward))
    return ReversibleSequential(made)


class ViT(nn.Module):
    """An encoder of patches, with the mean of all tokens before the head."""

    def __init__(self, width: int, depth: int, heads: int, image: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.image = image
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        self.body, self.norm, self.head = stack(width, depth, heads, 0.1), nn.LayerNorm(width), nn.Linear(width, 1000)

    def data(self, batch: int, device: torch.device) -> Data:
        return images(batch, self.image, device)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return F.cross_entropy(self.head(self.norm(self.body(x)).mean(1)), labels)


def images(batch: int, size: int, device: torch.device) -> Data:
    return torch.randn(batch, 3, size, size, device=device), torch.randint(0, 1000, (batch,), device=device)


class Merge(nn.Module):
    """BranchReplay the height and width of an image, and twice its channels: an ordinary transition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        return self.linear(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    """Four stages of windowed attention, each a reversible stack, with merging of patches between them."""

    def __init__(self, width: int, depths: tuple[int, ...], image: int = 224, patch: int = 4, window: int = 7) -> None:
        super().__init__()
        self.image, self.embed = image, nn.Conv2d(3, width, patch, patch)
        parts: list[nn.Module] = []
        for stage, depth in enumerate(depths):
            at, shifted = width * 2**stage, image // patch // 2**stage > window
            parts += [Merge(at // 2)] if stage else []
            parts.append(stack(at, depth, at // 32, 0.1, window, shifted))
        self.body, self.norm, self.head = nn.Sequential(*parts), nn.LayerNorm(at), nn.Linear(at, 1000)

    def data(self, batch: int, device: torch.device) -> Data:
        return images(batch, self.image, device)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.body(self.embed(x).permute(0, 2, 3, 1).contiguous())
        return F.cross_entropy(self.head(self.norm(x).mean((1, 2))), labels)


class Roberta(nn.Module):
    """An encoder of tokens, and a head that predicts 15 % of them."""

    def __init__(self, width: int, depth: int, heads: int, vocabulary: int = 50265, length: int = 512) -> None:
        super().__init__()
        self.vocabulary, self.length = vocabulary, length
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.first, self.body, self.norm = nn.LayerNorm(width), stack(width, depth, heads, 0.1), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def data(self, batch: int, device: torch.device) -> Data:
        masked = round(0.15 * self.length)
        places = torch.rand(batch, self.length, device=device).topk(masked).indices
        words = torch.randint(0, self.vocabulary, (batch, self.length), device=device)
        return words, places, words.gather(1, places)

    def forward(self, words: torch.Tensor, places: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.body(self.first(self.embed(words) + self.positions)))
        x = x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


MODELS: dict[str, Any] = {"vit": ViT, "swin": Swin, "roberta": Roberta}


# --- the race test ---


class _Held(torch.autograd.Function):
    """Lets the stream that it runs on do nothing for so many cycles, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, before: int, after: int) -> torch.Tensor:
        ctx.after = after
        if before:
            torch.cuda._sleep(before)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        if ctx.after:
            torch.cuda._sleep(ctx.after)
        return d, None, None


class Hold(nn.Module):
    """Holds up its stream where it is computed, or where it is differentiated; only while ``Hold.on``.

    Args:
        phase: ``"recompute"``, ``"gradients"``, or an empty text for neither.
        cycles: for how long; a few milliseconds, so that the host has issued the work of other streams long before.
    """

    on = False

    def __init__(self, phase: str, cycles: int = 5_000_000) -> None:
        super().__init__()
        self.phase, self.cycles = phase, cycles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cycles = self.cycles if Hold.on and x.is_cuda else 0
        return _Held.apply(x, cycles * (self.phase == "recompute"), cycles * (self.phase == "gradients"))


class RaceNet(nn.Module):
    """A reversible stack between linear layers, some of whose branches hold up their stream.

    Args:
        depth: blocks.
        branch: ``"f"`` or ``"g"``.
        parity: whether in even (0) or odd (1) blocks.
        phase: as for :class:`Hold`.
        **options: of ``ReversibleSequential``.
    """

    def __init__(self, depth: int, branch: str, parity: int, phase: str, **options: Any) -> None:
        super().__init__()

        def one(index: int, name: str) -> nn.Sequential:
            held = phase if name == branch and index % 2 == parity else ""
            inner = (nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Dropout(0.1))
            return nn.Sequential(Hold(held), *inner, Hold(held))

        made = [ReversibleBlock(one(index, "f"), one(index, "g")) for index in range(depth)]
        self.parts = nn.Sequential(nn.Linear(64, 64), ReversibleSequential(made, **options), nn.LayerNorm(64))

    def data(self, batch: int, device: torch.device) -> Data:
        return (torch.randn(batch, 32, 64, device=device),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x).sin().square().mean()
