"""Small models whose layers can be made reversible: of torch, of transformers, and of timm's structure."""

import pytest
import torch
from reversible_problems import DropPath
from torch import nn


class TimmLike(nn.Module):
    """A block of timm's structure."""

    def __init__(self, *_, drop_path, **__):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        self.attn, self.mlp = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(5), nn.Linear(16, 8))
        self.ls1, self.ls2 = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def encoder(norm_first=True, kind=nn.TransformerEncoderLayer, batch_first=True):
    layer = kind(8, 2, 16, dropout=0.2, norm_first=norm_first, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, nn.LayerNorm(8), enable_nested_tensor=not norm_first)


def timm(own=False):
    make = pytest.importorskip("timm.models.vision_transformer").Block if own else TimmLike
    return nn.ModuleDict({"blocks": nn.Sequential(*(make(8, 2, init_values=0.1, drop_path=0.2) for _ in range(3)))})


DECODER = {"vocab_size": 30, "use_cache": False}
GPT2 = DECODER | {"n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 12}
LLAMA = DECODER | {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
VIT = TEXT | {"image_size": 16, "num_channels": 1, "patch_size": 4}
SWIN = {"image_size": 16, "num_channels": 1, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
HIERA = {"embed_dim": 8, "image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2], "num_channels": 1}
HIERA |= {"patch_padding": [1, 1], "depths": [1, 3], "num_heads": [1, 2], "masked_unit_size": [2, 2]}
HIERA |= {"masked_unit_attention": [True, False], "num_query_pool": 1, "drop_path_rate": 0.3}


def library(name, settings):
    import transformers

    config = getattr(transformers, name.split("For")[0].removesuffix("Model").removesuffix("LMHead") + "Config")
    return getattr(transformers, name)(config(**settings))


def wave(*shape):
    return torch.linspace(-3, 3, torch.Size(shape).numel(), dtype=torch.double).view(shape).sin()


def run(model):
    if isinstance(model, nn.TransformerEncoder):
        padded, causal = torch.arange(5) >= torch.tensor([[5], [3]]), torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        first = model.layers[0].self_attn.batch_first
        return model(wave(2, 5, 8) if first else wave(5, 2, 8), causal, padded, is_causal=not first)
    if isinstance(model, nn.ModuleDict):
        return model["blocks"](wave(2, 5, 8))
    if hasattr(model.config, "vocab_size") and not hasattr(model.config, "patch_size"):
        return model(torch.arange(3, 17).view(2, 7), attention_mask=torch.arange(7)[None] < torch.tensor([[7], [5]]))[0]
    return model(wave(2, 1, 16, 16))[0]
