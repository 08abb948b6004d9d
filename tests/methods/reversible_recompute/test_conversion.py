"""Converted models compute the two streams of their own layers, keep weights and names, and go back."""

import copy
import pickle

import pytest
import torch
from convertible_models import GPT2, HIERA, LLAMA, SWIN, TEXT, VIT, encoder, library, run, timm
from reversible_problems import SCHEDULES, gradient, relative
from torch import nn

from lightning_bpfree.methods.reversible_recompute.conversion import FunctionChangedWarning, convert_to_reversible

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


# --- models and their stacks by hand ---

ENCODER, WINDOWS = pre_norm("self_attn", "norm2"), pre_norm("attention", "layernorm_after")
GROUPED = {"num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0}  # queries share keys and values
LLAMA_BY_HAND = pre_norm("self_attn", "post_attention_layernorm")
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
    "RobertaPreLayerNormModel": (
        TEXT,
        {},
        {"encoder.layer": pre_norm("attention.output.dense", "intermediate.LayerNorm")},
    ),
    "GPT2Model": (GPT2, {}, {"h": pre_norm("attn", "ln_2")}),
    "LlamaModel": (LLAMA, {}, {"layers": LLAMA_BY_HAND}),
    **{
        f"{name}Model": (
            LLAMA | {"num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0},
            {},
            {"layers": LLAMA_BY_HAND},
        )
        for name in ("Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3")
    },
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
