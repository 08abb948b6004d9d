"""The networks of transformers have the shapes they say, draw no weights from anywhere, and can be made reversible."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from lightning_bpfree.demos.modules import Classifier
from lightning_bpfree.demos.transformers_nets import RobertaEncoderLM, SwinTransformer, VisionTransformer
from lightning_bpfree.methods.reversible_recompute.conversion import convert_to_reversible

VIT: dict[str, Any] = {"dim": 16, "depth": 3, "heads": 2}
SWIN: dict[str, Any] = {"in_shape": (1, 16, 16), "dim": 8, "depths": (2, 2), "heads": (1, 2), "window": 4}
ROBERTA: dict[str, Any] = {"vocab_size": 11, "dim": 16, "depth": 3, "heads": 2, "max_length": 6}

Make = Callable[..., nn.Module]
NETS: dict[str, tuple[Make, dict[str, Any], Callable[[], Tensor]]] = {
    "vit": (VisionTransformer, {**VIT, "dropout": 0.1}, lambda: torch.randn(4, 1, 8, 8)),
    "swin": (SwinTransformer, {**SWIN, "drop_path": 0.3}, lambda: torch.randn(4, 1, 16, 16)),
    "roberta": (RobertaEncoderLM, {**ROBERTA, "dropout": 0.1}, lambda: torch.randint(11, (4, 6))),
}
STACKS = {
    "vit": {"net.model.vit.layers": 3},
    "swin": {f"net.model.swin.encoder.layers.{stage}.blocks": 2 for stage in (0, 1)},
    "roberta": {"net.model.roberta.encoder.layer": 3},
}


# --- shapes ---


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 4), (2, 4, 12)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_vision_transformer_has_a_token_for_each_patch_and_one_for_the_class(
    shape: tuple[int, int, int], patch: int
) -> None:
    net = VisionTransformer(shape, 7, patch=patch, **VIT)
    assert net(torch.randn(3, *shape)).shape == (3, 7)
    assert net.model.vit.embeddings.position_embeddings.shape == (1, 1 + shape[1] // patch * (shape[2] // patch), 16)


@pytest.mark.parametrize(("shape", "window"), [((1, 28, 28), 4), ((3, 8, 16), 1), ((1, 20, 12), 2)])
def test_swin_halves_the_image_between_stages_and_doubles_the_width(shape: tuple[int, int, int], window: int) -> None:
    net = SwinTransformer(shape, 7, dim=8, depths=(1, 2, 1), heads=(1, 2, 4), window=window, patch=2)
    assert net(torch.randn(3, *shape)).shape == (3, 7)
    assert net.model.classifier.weight.shape == (7, 32)
    assert [len(stage.blocks) for stage in net.model.swin.encoder.layers] == [1, 2, 1]


@pytest.mark.parametrize("length", [1, 5, 6])
def test_roberta_gives_logits_for_every_position_of_up_to_the_longest_sequence(length: int) -> None:
    assert RobertaEncoderLM(**ROBERTA)(torch.randint(11, (3, length))).shape == (3, length, 11)


def test_all_tokens_are_alike_to_roberta_and_all_positions_see_each_other() -> None:
    net = RobertaEncoderLM(**ROBERTA).eval()
    embed = net.model.roberta.embeddings.word_embeddings
    tokens = torch.arange(6).unsqueeze(0)  # the first of which many configurations pad with
    logits = net(tokens)
    logits[0, 0].square().sum().backward()
    assert embed.weight.grad is not None
    assert bool((embed.weight.grad[:6] != 0).any(1).all())
    # a permutation of the vocabulary permutes the logits
    order = torch.randperm(11)
    with torch.no_grad():
        embed.weight.copy_(embed.weight[order].clone())
        net.model.lm_head.bias.copy_(net.model.lm_head.bias[order].clone())
    torch.testing.assert_close(net(order.argsort()[tokens]), logits[..., order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_weights_are_drawn_by_the_global_seed_and_wide_enough_for_narrow_networks(name: str) -> None:
    make, settings, _ = NETS[name]
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(make(**settings).state_dict())
    keys = [key for key, value in nets[0].items() if value.dim() > 1 and bool(value.any())]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in keys)
    assert not any(torch.equal(nets[0][key], nets[2][key]) for key in keys)
    linear = torch.cat(
        [value.flatten() for key, value in nets[0].items() if key.endswith("weight") and value.dim() == 2]
    )
    # thousands of draws: a tenth is many standard errors of their deviation
    assert float(linear.std()) == pytest.approx(16**-0.5, rel=0.1)


# --- reversible ---


def losses(name: str, schedule: Any) -> list[float]:
    """Losses of a few steps in double precision, from the same seed."""
    torch.manual_seed(0)
    make, settings, inputs = NETS[name]
    model = Classifier(make(**settings)).double()
    convert_to_reversible(model, schedule=schedule, rewire="pre_norm" if name == "roberta" else None, warn=False)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(4):
        x = inputs()
        logits = model(x.double() if x.is_floating_point() else x)
        loss = F.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_losses_step_by_step_are_the_same_under_every_schedule(name: str) -> None:
    want = losses(name, "autograd")
    assert len(set(want)) == 4
    assert losses(name, "checkpoint") == want
    sequential = losses(name, "sequential")
    assert sequential == pytest.approx(want, rel=1e-11)  # recovered inputs are rounded: 1e-16 a step and layer
    assert losses(name, "parallel") == sequential


@pytest.mark.parametrize("name", NETS)
def test_all_stacks_are_found_and_names_of_weights_stay(name: str) -> None:
    make, settings, _ = NETS[name]
    model = Classifier(make(**settings))
    names = list(model.state_dict())
    conversion = convert_to_reversible(model, rewire="pre_norm" if name == "roberta" else None, warn=False)
    assert {entry.path: entry.reversible for entry in conversion.report} == STACKS[name]
    assert list(model.state_dict()) == names


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionTransformer((8, 8)), r"in_shape=\(8, 8\): give a list of 3"),  # type: ignore[arg-type]
        (lambda: VisionTransformer((1, 0, 8)), r"in_shape=\(1, 0, 8\): give a list of 3"),
        (lambda: VisionTransformer(patch=3), "patch is 3, which does not divide the image of 8 x 8"),
        (lambda: VisionTransformer(patch=0), "patch=0: give a whole number of at least 1"),
        (lambda: VisionTransformer(dim=30), "dim is 30 and heads 4; make dim a multiple"),
        (lambda: VisionTransformer(depth=0), "depth=0: give a whole number of at least 1"),
        (lambda: VisionTransformer(mlp_ratio=0), "mlp_ratio=0: give a whole number of at least 1"),
        (lambda: VisionTransformer(num_classes=0), "num_classes=0: give a whole number of at least 1"),
        (lambda: VisionTransformer(dropout=1.0), r"dropout=1\.0: give a number in \[0"),
        (
            lambda: VisionTransformer(**VIT)(torch.zeros(2, 1, 8, 4)),
            r"VisionTransformer was built for .*\(2, 1, 8, 4\)",
        ),
        (lambda: SwinTransformer(depths=()), r"depths=\(\): give a list of whole numbers of at least 1"),
        (lambda: SwinTransformer(heads=(2,)), r"depths is \(2, 2\) and heads \(2,\)"),
        (lambda: SwinTransformer(depths=(2, 0)), r"depths=\(2, 0\): give a list of whole numbers of at least 1"),
        (lambda: SwinTransformer(heads=(2, 0)), r"heads=\(2, 0\): give a list of whole numbers of at least 1"),
        (lambda: SwinTransformer(heads=(2, 3)), "dim is 64 and heads 3"),
        (lambda: SwinTransformer(window=8), "window is 8, but stage 1 has 7 x 7 tokens; give at most 7"),
        (lambda: SwinTransformer((1, 6, 28), window=3), "window is 3, but stage 1 has 2 x 7 tokens; give at most 2"),
        (lambda: SwinTransformer(window=0), "window=0: give a whole number of at least 1"),
        (lambda: SwinTransformer(patch=3), "patch is 3, which does not divide the image of 28 x 28"),
        (lambda: SwinTransformer(drop_path=-0.1), r"drop_path=-0\.1: give a number in \[0"),
        (lambda: SwinTransformer(**SWIN)(torch.zeros(2, 16, 16)), "SwinTransformer was built for"),
        (lambda: RobertaEncoderLM(vocab_size=1), "vocab_size=1: give a whole number of at least 2"),
        (lambda: RobertaEncoderLM(max_length=0), "max_length=0: give a whole number of at least 1"),
        (lambda: RobertaEncoderLM(dim=10), "dim is 10 and heads 4"),
        (lambda: RobertaEncoderLM(dropout=float("nan")), r"dropout=nan: give a number in \[0"),
        (lambda: RobertaEncoderLM(**ROBERTA)(torch.zeros(2, 7, dtype=torch.int64)), r"up to 6\), got \(2, 7\)"),
        (lambda: RobertaEncoderLM(**ROBERTA)(torch.zeros(6, dtype=torch.int64)), r"up to 6\), got \(6,\)"),
    ],
)
def test_bad_input_is_named_with_the_cure(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [VisionTransformer, SwinTransformer, RobertaEncoderLM])
def test_a_missing_library_names_the_extra(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=rf'{make.__name__} needs .*install "lightning-bpfree\[vision\]"'):
        make()
