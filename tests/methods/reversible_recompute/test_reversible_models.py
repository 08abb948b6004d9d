"""Models of every family: gradients, random streams, memory, copies and states, against plain autograd."""

import copy
import io
import sys

import pytest
import torch
from torch import nn

from lightning_bpfree.core.recompute_context import Draws
from lightning_bpfree.methods.reversible_recompute.layer_stack import ReversibleLayers
from lightning_bpfree.methods.reversible_recompute.models.builders import (
    reversible_hiera,
    reversible_roberta,
    reversible_swin,
    reversible_vit,
    set_schedule,
)
from lightning_bpfree.methods.reversible_recompute.models.mvit import ReversibleMViT

# Relative to the norm of the whole gradient, in float64: a few hundred roundings of 1e-16 each.
EXACT = 1e-12

VIT = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
SWIN = {
    "embed_dim": 8,
    "num_heads": [1, 2],
    "window_size": 3,  # does not divide the grids of 8 and 4: windows are padded and shifted
    "image_size": 16,
    "patch_size": 2,
    "num_labels": 5,
    "drop_path_rate": 0.3,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
HIERA = {
    "embed_dim": 8,
    "num_heads": [1, 2],
    "masked_unit_attention": [True, False],
    "image_size": [16, 16],
    "masked_unit_size": [2, 2],
    "num_query_pool": 1,
    "num_labels": 5,
    "drop_path_rate": 0.3,
}
ROBERTA = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 20,
    "max_position_embeddings": 12,
    "num_labels": 5,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def mvit(depth, **kwargs):
    """Its grid has odd sides, and becomes (3, 2)."""
    model = ReversibleMViT((3, 20, 12), 5, 8, (depth, 1), 2, dropout=0.1, drop_path=0.3, **kwargs)
    return model, {"images": torch.randn(3, 3, 20, 12)}


def vit(depth, **kwargs):
    return reversible_vit({**VIT, "num_hidden_layers": depth}, **kwargs), {"pixel_values": torch.randn(3, 3, 8, 8)}


def swin(depth, **kwargs):
    return reversible_swin({**SWIN, "depths": [depth, 1]}, **kwargs), {"pixel_values": torch.randn(3, 3, 16, 16)}


def hiera(depth, **kwargs):
    """The first layer of the second stage pools, so depth + 1 layers are depth reversible ones."""
    model = reversible_hiera({**HIERA, "depths": [1, depth + 1]}, **kwargs)
    return model, {"pixel_values": torch.randn(3, 3, 16, 16)}


def roberta(depth, **kwargs):
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0
    model = reversible_roberta({**ROBERTA, "num_hidden_layers": depth}, **kwargs)
    return model, {"input_ids": torch.randint(3, 20, (3, 7)), "attention_mask": mask}


CASES = {
    "mvit": (mvit, {}),
    "mvit, concat": (mvit, {"fusion": "concat", "last_fusion": "mean"}),
    "mvit, buffered": (mvit, {"buffer_every": 2, "store_last": 1}),
    "vit": (vit, {}),
    "vit, mean": (vit, {"fusion": "mean"}),
    "swin": (swin, {}),
    "swin, concat_linear": (swin, {"fusion": "concat_linear"}),
    "hiera": (hiera, {}),
    "roberta": (roberta, {}),
    "roberta, scaled": (roberta, {"rewire": "scaled", "scale": 0.5, "buffer_every": 1}),
    "roberta, sequence": (roberta, {"head": "sequence_classification", "fusion": "concat_linear"}),
    "roberta, causal": (roberta, {"head": "causal_lm", "buffer_every": 2, "store_last": 1}),
}
FAMILIES = {"mvit": mvit, "vit": vit, "swin": swin, "hiera": hiera, "roberta": roberta}
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def made(make, depth=3, **kwargs):
    """A model in float64 and its input."""
    model, inputs = make(depth, **kwargs)
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    return model.double(), inputs


def logits(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def step(model, inputs, schedule, seed=1):
    """The gradients of one pass by a schedule, the logits, and the random streams afterwards."""
    set_schedule(model, schedule)
    model.zero_grad()
    torch.manual_seed(seed)
    out = logits(model, inputs)
    out.square().sum().backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return grads, out.detach(), Draws.now(out)


def off(grads, expected):
    """The error of a whole gradient, relative to its norm."""
    assert [name for name, g in grads.items() if g is None] == [name for name, g in expected.items() if g is None]
    both = [(grads[name], g) for name, g in expected.items() if g is not None]
    size = sum(float(g.square().sum()) for _, g in both) ** 0.5
    return sum(float((a - b).square().sum()) for a, b in both) ** 0.5 / size


def same(grads, expected):
    return all((g is expected[name]) or torch.equal(g, expected[name]) for name, g in grads.items())


# --- gradients ---


@pytest.mark.parametrize(
    ("case", "depth"), [(case, depth) for case in CASES for depth in (1, 2, 3) if depth == 3 or case in FAMILIES]
)
def test_gradients_and_random_streams_are_those_of_autograd(case, depth):
    make, kwargs = CASES[case]
    model, inputs = made(make, depth, **kwargs)
    expected, out, draws = step(model, inputs, "autograd")
    found = {schedule: step(model, inputs, schedule) for schedule in ("checkpoint", "sequential", "parallel")}
    for grads, own_out, own_draws in found.values():
        # The same operators; with dropout, attention has one kernel, whether a graph is wanted or not.
        assert torch.equal(own_out, out)
        assert own_draws.equals(draws)
        assert off(grads, expected) < EXACT
    assert same(found["sequential"][0], found["parallel"][0])


@pytest.mark.slow
@every_family
def test_dropout_and_stochastic_depth_are_on(make):
    model, inputs = made(make)
    grads, *_ = step(model, inputs, "sequential")
    again, *_ = step(model, inputs, "sequential")
    other, *_ = step(model, inputs, "sequential", seed=2)
    assert same(grads, again)
    assert off(other, grads) > 0.01


@pytest.mark.slow
@every_family
def test_two_passes_may_come_before_their_gradients(make):
    model, inputs = made(make)
    _, twice = made(make)

    def grads(schedule):
        set_schedule(model, schedule)
        model.zero_grad()
        torch.manual_seed(1)
        losses = [logits(model, x).square().sum() for x in (inputs, twice)]
        losses[0].backward()
        losses[1].backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    assert off(grads("parallel"), grads("autograd")) < EXACT


# --- memory ---


def saved_bytes(model, inputs, schedule):
    """Bytes of what autograd saves in a forward pass, beside parameters."""
    set_schedule(model, schedule)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = []

    def pack(x):
        sizes.append(0 if x.untyped_storage().data_ptr() in own else x.numel() * x.element_size())
        return x

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits(model, inputs)
    return sum(sizes)


@every_family
def test_saved_bytes_do_not_grow_with_the_depth_of_a_stage(make):
    shallow, deep = made(make, 1), made(make, 4)
    for schedule in ("sequential", "parallel"):
        assert saved_bytes(*deep, schedule) == saved_bytes(*shallow, schedule)
    assert saved_bytes(*deep, "autograd") > saved_bytes(*shallow, "autograd") > saved_bytes(*shallow, "parallel")


# --- modules like any other ---


@every_family
def test_states_load_into_a_model_built_anew(make):
    model, inputs = made(make)
    other, _ = made(make)
    assert not torch.equal(logits(model.eval(), inputs), logits(other.eval(), inputs))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, inputs), logits(other, inputs))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies_compute_the_same_and_live_alone(make, copied):
    model, inputs = made(make)
    expected, *_ = step(model, inputs, "sequential")  # a model that has run leaves nothing behind that cannot be copied
    other = copied(model)
    assert same(step(other, inputs, "sequential")[0], expected)
    set_schedule(other, "autograd")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert same(step(model, inputs, "sequential")[0], expected)
    set_schedule(other, "parallel")
    assert {m.schedule for m in model.modules() if isinstance(m, ReversibleLayers)} <= {"sequential"}


@every_family
def test_evaluation_draws_nothing(make):
    model, inputs = made(make)
    model.eval()
    before = Draws.now(torch.zeros(1))
    expected = logits(model, inputs)
    for schedule in ("sequential", "parallel", "checkpoint", "autograd"):
        set_schedule(model, schedule)
        out = logits(model, inputs)
        assert torch.equal(logits(model, inputs), out)
        # Without dropout, attention has another kernel where a bias such as Swin's needs a gradient.
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert before.equals(Draws.now(torch.zeros(1)))


def test_the_names_of_parameters_are_those_of_transformers():
    import transformers

    found = {
        "ViT": reversible_vit({**VIT, "num_hidden_layers": 2}, fusion="mean"),
        "Swin": reversible_swin({**SWIN, "depths": [2, 1]}),
        "Hiera": reversible_hiera({**HIERA, "depths": [2, 2]}),
    }
    for family, model in found.items():
        plain = getattr(transformers, f"{family}ForImageClassification")(model.config)
        shapes = {name: x.shape for name, x in plain.state_dict().items()}
        assert {name: x.shape for name, x in model.state_dict().items()} == shapes
    model = reversible_roberta({**ROBERTA, "num_hidden_layers": 2})
    plain = transformers.RobertaForMaskedLM(model.config)
    assert model.state_dict().keys() == plain.state_dict().keys()


# --- builders ---


def test_the_classifier_of_a_vit_sees_both_streams():
    model, inputs = made(vit)
    model.eval()
    layers = model.vit.layers
    x1 = x2 = model.vit.embeddings(inputs["pixel_values"])
    for layer in (layers[index] for index in range(3)):
        x1 = x1 + layer.attention(layer.layernorm_before(x2))[0]
        x2 = x2 + layer.mlp(layer.layernorm_after(x1))
    both = model.vit.layernorm(torch.cat((x1, x2), 2))[:, 0]
    # Written out again: the same operators in the same order, but for attention's shapes.
    torch.testing.assert_close(logits(model, inputs), model.classifier(both), rtol=1e-12, atol=1e-12)
    assert model.vit.layernorm.weight.shape == (16,)
    assert isinstance(reversible_vit({**VIT, "num_hidden_layers": 1, "num_labels": 0}).classifier, nn.Identity)


def test_a_causal_model_sees_no_later_token():
    model, inputs = made(roberta, head="causal_lm")
    inputs = {"input_ids": inputs["input_ids"]}
    out = logits(model.eval(), inputs)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][:, 4] = (inputs["input_ids"][:, 4] - 2) % 17 + 3  # another token that is no special one
    other = logits(model, inputs)
    assert torch.equal(out[:, :4], other[:, :4])
    assert not torch.equal(out[:, 4:], other[:, 4:])


def test_a_config_may_be_an_object_and_stays_what_it_is():
    import transformers

    config = transformers.RobertaConfig(**ROBERTA, num_hidden_layers=2)
    before = config.to_dict()
    model = reversible_roberta(config, head="causal_lm")
    assert config.to_dict() == before
    assert (model.config.is_decoder, model.config.use_cache) == (True, False)
    assert model.config.hidden_size == 8


def test_options_reach_every_stack():
    options = {"schedule": "parallel", "buffer_every": 2, "max_error": 0.5, "check_every": 3, "store_last": 1}
    for model in (vit(2, **options)[0], vit(2, fusion="mean", **options)[0], swin(2, **options)[0]):
        stacks = [m for m in model.modules() if isinstance(m, ReversibleLayers)]
        for recomputation in (r for stack in stacks for r in stack.recomputations):
            assert {key: getattr(recomputation, key) for key in options} == options
        assert set_schedule(model, "checkpoint") == len(stacks)
        assert {stack.schedule for stack in stacks} == {"checkpoint"}


def test_set_schedule_counts_all_stacks_and_wants_one():
    both = nn.ModuleList([mvit(1)[0], swin(1)[0]])
    assert set_schedule(both, "autograd") == 4
    assert both[0].schedule == "autograd"
    with pytest.raises(ValueError, match="schedule='fast'"):
        set_schedule(both, "fast")
    assert both[0].schedule == "autograd"
    with pytest.raises(ValueError, match="Linear has no reversible stack"):
        set_schedule(nn.Linear(2, 2), "parallel")


def test_a_stage_of_one_pooling_layer_has_no_stack():
    assert set_schedule(reversible_hiera({**HIERA, "depths": [1, 1]}), "parallel") == 1


@pytest.mark.parametrize(
    ("build", "error", "said"),
    [
        (lambda: reversible_vit({"hiden_size": 8}), ValueError, "'hiden_size'.*similar names: hidden_size"),
        (lambda: reversible_swin(8), TypeError, "config is a int; give a SwinConfig"),
        (lambda: vit(1, fusion="sum"), ValueError, "fusion='sum'"),
        (lambda: swin(1, fusion="concat"), ValueError, "fusion='concat': choose 'mean'"),
        (lambda: vit(1, schedule="fast"), ValueError, "schedule='fast'"),
        (lambda: vit(1, store_last=-1), ValueError, "store_last=-1"),
        (lambda: vit(1, warn=True), TypeError, "warn=True: there is no such argument; nearest: max_error"),
        (
            lambda: hiera(1, rewire="pre_norm"),
            TypeError,
            "rewire='pre_norm': there is no such argument; nearest: buffer_every",
        ),
        (lambda: roberta(1, head="lm"), ValueError, "head='lm': choose 'masked_lm'"),
        (lambda: roberta(1, rewire=None), ValueError, "rewire=None: choose 'pre_norm' or 'scaled'"),
        (lambda: roberta(1, scale=0.0), ValueError, r"scale=0\.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(build, error, said):
    with pytest.raises(error, match=said):
        build()


def test_transformers_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-bpfree\[vision\]"'):
        reversible_vit()
