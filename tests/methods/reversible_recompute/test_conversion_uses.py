"""Conversion refuses what it would get wrong, and fits what models do with their layers."""

import lightning.pytorch as pl
import pytest
import torch
from convertible_models import GPT2, HIERA, LLAMA, SWIN, TEXT, VIT, encoder, library, run, timm, wave
from reversible_problems import SCHEDULES, gradient, relative
from torch import nn

from lightning_bpfree.methods.reversible_recompute.conversion import convert_to_reversible

slow = pytest.mark.slow

# --- refusals ---


class LookAlike(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) * 2


class ListLike(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return [super()._ff_block(x)]

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return src


def hooked(model):
    model.layers[1].register_forward_hook(lambda *args: None)


REFUSED = {
    r"names 'layer', which the model does not have.*layers": (encoder, {"stacks": "layer"}),
    "names 'norm', a LayerNorm; give the nn.ModuleList": (encoder, {"stacks": ["norm"]}),
    "holds a Linear of no known family": (lambda: nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]), {"stacks": "0"}),
    "has no nn.ModuleList or nn.Sequential of known layers": (lambda: nn.Linear(2, 2), {}),
    r"holds a TimmLike beside a torch\.nn": (lambda: nn.ModuleList([encoder().layers.append(timm()["blocks"][0])]), {}),
    "holds post-norm layers.*rewire='pre_norm'": (lambda: encoder(False), {}),
    "rewire='pre_norm' is for post-norm layers": (encoder, {"rewire": "pre_norm"}),
    "rewire='x'": (encoder, {"rewire": "x"}),
    "fusion='concat': choose 'mean'": (encoder, {"fusion": "concat"}),
    "scale=0": (encoder, {"scale": 0}),
    "schedule='x'": (encoder, {"schedule": "x"}),
    "buffer_every='all'": (encoder, {"buffer_every": "all"}),
    "stacks=": (encoder, {"stacks": []}),
    "fusion='concat_linear'": (encoder, {"fusion": "concat_linear", "branches": (max, min)}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused_and_nothing_is_touched(said):
    make, settings = REFUSED[said]
    model = make()
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=said):
        convert_to_reversible(model, warn=False, **settings)
    assert list(model.named_modules()) == modules


def test_refused_when_it_is_called():
    for model, change, said in (
        (encoder(kind=LookAlike), lambda model: None, r"LookAlike looks like a torch.*branches=\(f, g\)"),
        (encoder(kind=ListLike), lambda model: None, r"ListLike looks like a torch.*branches=\(f, g\)"),
        (encoder(), hooked, "layer 1 of a reversible stack has hooks"),
    ):
        convert_to_reversible(model, warn=False)
        change(model)
        with pytest.raises(RuntimeError, match=said):
            run(model.double())
    with pytest.raises(ValueError, match="'layers', which is already reversible"):
        convert_to_reversible(model, "layers", warn=False)


# --- particular uses ---


def test_own_branches():
    model, x = pl.LightningModule(), wave(2, 8)
    model.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).double()
    settings = {"branches": (lambda layer, x: layer(x).sin(), lambda layer, x: layer(x).cos()), "scale": (0.5, 2)}
    convert_to_reversible(model, "blocks", warn=False, fusion="max", **settings)
    x1 = x2 = x
    for layer in map(model.blocks.__getitem__, range(4)):
        x1 = 0.5 * x1 + layer(x2).sin()
        x2 = 2 * x2 + layer(x1).cos()
    torch.testing.assert_close(model.blocks(x), torch.maximum(x1, x2), rtol=1e-12, atol=1e-12)


def test_hooks_within_layers_hear_each_pass_once():
    model, heard = timm().double(), []
    hook = model["blocks"][0].mlp.register_forward_hook(lambda *_: heard.append("forward"))
    convert_to_reversible(model, warn=False, schedule="autograd")
    for _ in range(2):  # the first call also compares the layers with their branches
        run(model)
    assert len(heard) == 2
    hook.remove()
    assert not model["blocks"][0].mlp._forward_hooks


@pytest.mark.parametrize("gradients", [True, False])
def test_a_sample_that_is_padding_alone(gradients):
    # The fused kernel of the layer, which a comparison without gradients would take, gives no numbers here.
    model = encoder().eval()
    convert_to_reversible(model, warn=False)
    with torch.set_grad_enabled(gradients):
        out = model(wave(2, 5, 8).float(), src_key_padding_mask=torch.tensor([[False] * 5, [True] * 5]))
    assert out.isfinite().all()


def test_loops_and_slices_run_streams_and_numbers_give_layers():
    model = timm().double()
    layers = list(model["blocks"])
    for index, layer in enumerate(layers):
        layer.depth, layer.kind = index, "windows"
    convert_to_reversible(model, warn=False)
    blocks, x = model["blocks"].eval(), wave(2, 5, 8)
    assert [blocks[0], blocks[-1]] == [layers[0], layers[2]]

    def looped(parts):
        y = x
        for part in parts:
            y = part(y)
        return y

    assert torch.equal(looped(blocks[:3]), blocks(x))
    assert torch.equal(looped(blocks), blocks(x))
    first_two = nn.ModuleDict({"blocks": nn.Sequential(*layers[:2])})
    convert_to_reversible(first_two, warn=False)
    assert torch.equal(looped(blocks[:2]), first_two["blocks"](x))
    assert blocks[3:] == []
    (part,) = blocks[1:]
    assert part.kind == "windows"
    for name in ("depth", "norm1", "not_there"):  # they differ, or are no plain values
        with pytest.raises(AttributeError, match=name):
            getattr(part, name)
    with pytest.raises(IndexError, match="step -1"):
        blocks[::-1]


def test_a_list_with_two_owners_is_converted_for_both():
    model = pl.LightningModule()
    model.one, model.two = encoder(), encoder()
    model.two.layers = model.one.layers
    convert_to_reversible(model, "one.layers", warn=False)
    assert len(model.one.layers) == 3
    assert not isinstance(model.one.layers, nn.ModuleList)
    assert model.two.layers is model.one.layers


@slow
@pytest.mark.parametrize(
    ("name", "settings", "conversion"),
    [
        ("RobertaForCausalLM", TEXT | {"is_decoder": True}, {"rewire": "pre_norm"}),
        ("GPT2LMHeadModel", GPT2, {}),
        ("LlamaForCausalLM", LLAMA, {}),
    ],
)
def test_a_cache_is_filled_once(name, settings, conversion):
    model = library(name, settings).eval()
    convert_to_reversible(model, warn=False, **conversion)
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
        torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 4:], rtol=1e-4, atol=1e-5)  # float32
    with pytest.raises(ValueError, match=r"use_cache = False"):
        model(ids, use_cache=True)


@slow
def test_layers_that_models_give_masks_of_their_own_are_refused():
    sliding, full = "sliding_attention", "full_attention"
    settings = LLAMA | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 2}
    mixed = library("Qwen2Model", settings | {"layer_types": [sliding, full, full]})
    with pytest.raises(ValueError, match=r"several kinds of attention \(sliding_attention, full_attention\)"):
        convert_to_reversible(mixed, warn=False)
    outs = []
    for kind in (sliding, full):
        model = library("Qwen2Model", settings | {"layer_types": 3 * [kind]}).double()
        model.load_state_dict(mixed.state_dict())
        convert_to_reversible(model, warn=False)
        outs.append(run(model))
    assert relative(outs[0][:, :2], outs[1][:, :2]) < 1e-12  # all that these tokens see is within the window
    assert relative(outs[0][:, 2:], outs[1][:, 2:]) > 1e-3


@slow
@pytest.mark.parametrize("first", [False, True])
def test_hidden_states_are_refused_and_leave_nothing_behind(first):
    # The library leaves its hooks on the layers for good.
    model = library("ViTModel", VIT).double()
    if first:
        model(wave(2, 1, 16, 16), output_hidden_states=True)
    convert_to_reversible(model, warn=False)
    if not first:
        with pytest.raises(RuntimeError, match="turn off output_hidden_states"):
            model(wave(2, 1, 16, 16), output_hidden_states=True)
    run(model).sum().backward()


@slow
@pytest.mark.parametrize(("name", "settings"), [("SwinModel", SWIN), ("HieraModel", HIERA)])
def test_attention_maps_are_not_silently_missing(name, settings):
    model = library(name, settings | {"attn_implementation": "eager"}).double()
    convert_to_reversible(model, warn=False)
    with pytest.raises((RuntimeError, ValueError), match="output_attentions"):
        model(wave(2, 1, 16, 16), output_attentions=True)


@slow
@pytest.mark.parametrize("before", [True, False])
def test_adapters_and_gradient_checkpointing(before):
    import peft

    model = library("RobertaForMaskedLM", TEXT).double().train()
    settings = {"warn": False, "rewire": "pre_norm"}
    conversion = convert_to_reversible(model, **settings) if not before else None
    model.gradient_checkpointing_enable()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False))
    conversion = conversion or convert_to_reversible(model.double(), **settings)
    grads = []
    for conversion.stacks[0].schedule in SCHEDULES:
        model.zero_grad()
        torch.manual_seed(1)
        run(model.base_model.model).square().sum().backward()
        assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())
        grads.append(gradient(*(p for p in model.parameters() if p.requires_grad)))
        assert relative(grads[-1], grads[0]) < 1e-12


def test_undoing_puts_flags_back_that_two_lists_share():
    model = encoder()
    model.use_nested_tensor, model.more = True, nn.ModuleList(encoder().layers)
    conversion = convert_to_reversible(model, ["layers", "more"], warn=False)
    assert model.use_nested_tensor is False
    conversion.undo()
    assert model.use_nested_tensor is True
