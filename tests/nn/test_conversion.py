"""Converted models compute the two streams of their own layers, keep weights and names, and go back."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from reversible_problems import SCHEDULES, DropPath, gradient, relative
from torch import nn

from lightning_bpfree.nn.conversion import FunctionChangedWarning, convert_to_reversible

# --- two streams by hand, of what the layers' own sub-modules say ---


class ByHand(nn.Module):
    """In the place of all layers of a list."""

    def __init__(self, layers, f, g, scale=1.0):
        super().__init__()
        self.layers, self.f, self.g, self.scale = nn.ModuleList(layers), f, g, scale

    def __getattr__(self, name):  # models look at their first layer
        return super().__getattr__(name) if name in ("layers", "_modules") else getattr(self.layers[0], name)

    def forward(self, x, *args, **kwargs):
        x1 = x2 = x
        for layer in self.layers:
            x1 = self.scale * x1 + self.f(layer, x2, *args, **kwargs)
            x2 = self.scale * x2 + self.g(layer, x1, *args, **kwargs)
        y = (x1 + x2) / 2 if self.scale == 1.0 else x2
        return (y, None) if hasattr(self.layers[0], "drop_path") else y


def stack_of(f, g, **settings):
    return lambda layers: nn.Sequential(ByHand(layers, f, g, **settings))


def pre_norm(attention, norm):
    """Branches of layers with two skips: what comes before the second norm, and what is left without attention."""

    def f(layer, x, *args, **kwargs):
        seen = []
        hook = layer.get_submodule(norm).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        layer(x, *args, **kwargs)
        hook.remove()
        return seen[0] - x

    def g(layer, x, *args, **kwargs):
        hook = layer.get_submodule(attention).register_forward_hook(
            lambda module, _, out: (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out
        )
        out = layer(x, *args, **kwargs)
        hook.remove()
        return (out[0] if isinstance(out, tuple) else out) - x

    return stack_of(f, g)


BERT = stack_of(
    lambda layer, x, mask, *_, **__: layer.attention.output.dense(
        layer.attention.self(layer.attention.output.LayerNorm(x), mask)[0]
    ),
    lambda layer, x, *_, **__: layer.output.dense(layer.intermediate(layer.output.LayerNorm(x))),
)
BERT_SCALED = stack_of(
    lambda layer, x, mask, *_, **__: layer.attention(x, mask)[0],
    lambda layer, x, *_, **__: layer.output(layer.intermediate(x), x),
    scale=0.1,
)
ENCODER_SCALED = stack_of(
    lambda layer, x, src_mask, src_key_padding_mask, **_: layer.norm1(
        x + layer.self_attn(x, x, x, src_key_padding_mask, False, src_mask)[0]
    ),
    lambda layer, x, **_: layer.norm2(x + layer.linear2(layer.activation(layer.linear1(x)))),
    scale=0.1,
)


# --- models ---


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


TEXT = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
VIT = TEXT | {"image_size": 16, "num_channels": 1, "patch_size": 4}
SWIN = {"image_size": 16, "num_channels": 1, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
HIERA = {"embed_dim": 8, "image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2], "num_channels": 1}
HIERA |= {"patch_padding": [1, 1], "depths": [1, 3], "num_heads": [1, 2], "masked_unit_size": [2, 2]}
HIERA |= {"masked_unit_attention": [True, False], "num_query_pool": 1, "drop_path_rate": 0.3}


def library(name, settings):
    import transformers

    config = getattr(transformers, name.split("For")[0].removesuffix("Model") + "Config")
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
        return model(torch.arange(3, 17).view(2, 7), torch.arange(7)[None] < torch.tensor([[7], [5]]))[0]
    return model(wave(2, 1, 16, 16))[0]


ENCODER, WINDOWS = pre_norm("self_attn", "norm2"), pre_norm("attention", "layernorm_after")
UNITS = pre_norm("attn", "layernorm_after")
SWIN_STACKS = {f"encoder.layers.{i}.blocks": WINDOWS for i in (0, 1)}
HIERA_STACKS = {"encoder.stages.0.layers": UNITS}
HIERA_STACKS["encoder.stages.1.layers"] = lambda layers: nn.Sequential(layers[0], UNITS(layers[1:])[0])
# A model, arguments of the conversion, and the stacks by hand. Windows of 3 pad, one of 4 is the whole image.
CASES = {
    "encoder": (encoder, {}, {"layers": ENCODER}),
    "encoder, tokens first": (lambda: encoder(batch_first=False), {}, {"layers": ENCODER}),
    "post-norm encoder": (lambda: encoder(False), {"rewire": "scaled"}, {"layers": ENCODER_SCALED}),
    "timm-like": (timm, {}, {"blocks": pre_norm("ls1", "norm2")}),
    "timm": (lambda: timm(own=True), {}, {"blocks": pre_norm("ls1", "norm2")}),
    "ViTModel": (VIT, {}, {"layers": WINDOWS}),
    "SwinModel": (SWIN | {"window_size": 3, "drop_path_rate": 0.3}, {}, SWIN_STACKS),
    "SwinModel, one window": (SWIN | {"window_size": 4}, {}, SWIN_STACKS),
    "HieraModel": (HIERA, {}, HIERA_STACKS),
    "RobertaForMaskedLM": (TEXT, {"rewire": "pre_norm"}, {"roberta.encoder.layer": BERT}),
    "RobertaModel, scaled": (TEXT, {"rewire": "scaled"}, {"encoder.layer": BERT_SCALED}),
    "BertModel": (TEXT, {"rewire": "pre_norm"}, {"encoder.layer": BERT}),
}
slow = pytest.mark.slow
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[slow] if isinstance(case[0], dict) else []) for name, case in CASES.items()]
)


def case(name):
    made, settings, stacks = CASES[name]
    return (library(name.split(",")[0], made) if isinstance(made, dict) else made()).double(), settings, stacks


@every_model
def test_conversion_and_the_way_back(name):
    model, settings, stacks = case(name)
    model.eval()
    before, state = run(model), copy.deepcopy(model.state_dict())
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    flags = {name: value for name, value in vars(model).items() if isinstance(value, bool)}
    by_hand = copy.deepcopy(model)
    for path, make_stack in stacks.items():
        owner, _, last = path.rpartition(".")
        setattr(by_hand.get_submodule(owner), last, make_stack(list(by_hand.get_submodule(path).children())))
    with pytest.warns(FunctionChangedWarning, match="CHANGES THE FUNCTION"):
        conversion = convert_to_reversible(model, **settings)
    assert [entry.path for entry in conversion.report] == list(stacks)
    # The same sums in another order.
    torch.testing.assert_close(run(model), run(by_hand), rtol=1e-10, atol=1e-10)
    assert relative(run(model), before) > 1e-3
    assert not any(module.training for module in model.modules())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other), run(model))
    conversion.undo()
    assert list(modules.items()) == list(model.named_modules())
    assert flags == {name: value for name, value in vars(model).items() if isinstance(value, bool)}
    assert torch.equal(run(model), before)


@every_model
def test_gradients_and_random_numbers_of_converted_models(name):
    model, settings, _ = case(name)
    model.train()
    conversion, outcomes = convert_to_reversible(model, warn=False, **settings), {}
    for schedule in SCHEDULES:
        for stack in conversion.stacks:
            stack.schedule = schedule
        model.zero_grad()
        torch.manual_seed(1)  # the first call compares layers, and draws no numbers of its own
        loss = run(model).square().sum()
        loss.backward()
        outcomes[schedule] = loss.detach(), gradient(*model.parameters()), torch.get_rng_state()
    counts = [int(buffer) for buffer_name, buffer in model.named_buffers() if "tracked" in buffer_name]
    assert counts == len(counts) * [len(SCHEDULES)]
    for loss, grads, state in outcomes.values():
        assert torch.equal(loss, outcomes["autograd"][0])
        assert torch.equal(state, outcomes["autograd"][2])
        # Scales of 0.1 lose two digits a branch.
        assert relative(grads, outcomes["autograd"][1]) < (1e-9 if "scaled" in settings.values() else 1e-12)
    assert torch.equal(outcomes["sequential"][1], outcomes["parallel"][1])


# --- refusals ---


class LookAlike(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) * 2


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
    "fusion='concat' doubles the width": (encoder, {"fusion": "concat"}),
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
        (encoder(), hooked, "layer 1 of a reversible stack has hooks"),
    ):
        convert_to_reversible(model, warn=False)
        change(model)
        with pytest.raises(RuntimeError, match=said):
            run(model.double())
    with pytest.raises(ValueError, match="'layers', which is reversible already"):
        convert_to_reversible(model, "layers", warn=False)


# --- particular uses ---


def test_own_branches():
    model, x = pl.LightningModule(), wave(2, 8)
    model.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).double()
    settings = {"branches": (lambda layer, x: layer(x).sin(), lambda layer, x: layer(x).cos()), "scale": (0.5, 2)}
    convert_to_reversible(model, "blocks", warn=False, fusion="max", **settings)
    x1 = x2 = x
    for layer in model.blocks[:]:
        x1 = 0.5 * x1 + layer(x2).sin()
        x2 = 2 * x2 + layer(x1).cos()
    torch.testing.assert_close(model.blocks(x), torch.maximum(x1, x2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_sample_that_is_padding_alone(gradients):
    # The fused kernel of the layer, which a comparison without gradients would take, gives no numbers here.
    model = encoder().eval()
    convert_to_reversible(model, warn=False)
    with torch.set_grad_enabled(gradients):
        out = model(wave(2, 5, 8).float(), src_key_padding_mask=torch.tensor([[False] * 5, [True] * 5]))
    assert out.isfinite().all()


def test_a_list_with_two_owners_is_converted_for_both():
    model = pl.LightningModule()
    model.one, model.two = encoder(), encoder()
    model.two.layers = model.one.layers
    convert_to_reversible(model, "one.layers", warn=False)
    assert len(model.one.layers) == 3
    assert not isinstance(model.one.layers, nn.ModuleList)
    assert model.two.layers is model.one.layers


@slow
def test_a_cache_is_filled_once():
    model = library("RobertaForCausalLM", TEXT | {"is_decoder": True}).eval()
    convert_to_reversible(model, warn=False, rewire="pre_norm")
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
        torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 4:], rtol=1e-4, atol=1e-5)  # float32
    with pytest.raises(ValueError, match=r"use_cache = False"):
        model(ids, use_cache=True)


@slow
@pytest.mark.parametrize("first", [False, True])
def test_hidden_states_are_refused_and_leave_nothing_behind(first):
    # The library leaves its hooks on the layers for good.
    model = library("ViTModel", VIT).double()
    if first:
        model(wave(2, 1, 16, 16), output_hidden_states=True)
    convert_to_reversible(model, warn=False)
    if not first:
        with pytest.raises(RuntimeError, match="do without output_hidden_states"):
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
