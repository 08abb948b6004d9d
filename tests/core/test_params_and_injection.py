"""Parameters are replaced everywhere they are used and come back; injected gradients pass as autograd's own."""

import pytest
import torch
from problems import Tied
from torch import nn

from lightning_bpfree.core.injection import inject
from lightning_bpfree.core.params import ParameterSlots, count, dot, norm


def test_tied_weights_are_one_slot_under_either_name():
    net = Tied()
    names = [slot.name for slot in ParameterSlots(net)]
    assert "inner.weight" in names
    assert "again.weight" not in names
    assert [slot.name for slot in ParameterSlots(net, "again.weight")] == ["inner.weight"]
    assert "frozen.weight" not in [slot.name for slot in ParameterSlots(net).trainable()]


@pytest.mark.parametrize(
    "net", [nn.Linear(3, 2), nn.LSTM(3, 2, batch_first=True), nn.GRU(3, 2, batch_first=True), Tied()]
)
def test_replaced_equals_a_module_that_holds_the_new_values(net):
    x = torch.randn(4, 6) if isinstance(net, Tied) else torch.randn(4, 5, 3)
    slots = ParameterSlots(net)
    moved = {slot.name: slot.parameter.detach() + 0.1 for slot in slots}
    originals = dict(net.named_parameters())
    before = {name: p.clone() for name, p in originals.items()}

    def run():
        out = net(x)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        own = run()
        with slots.replaced(moved):
            inside = run()
        assert torch.equal(run(), own) or isinstance(net, Tied)  # Tied's BatchNorm has moved, in training mode
        for parameter in net.parameters():
            parameter.add_(0.1)
        torch.testing.assert_close(inside, run(), rtol=1e-6, atol=1e-6)
        for name, parameter in net.named_parameters():
            assert parameter is originals[name]
            torch.testing.assert_close(parameter, before[name] + 0.1)


def test_replaced_comes_back_after_an_exception():
    net = nn.LSTM(3, 2)
    slots = ParameterSlots(net)
    with pytest.raises(KeyError), slots.replaced({s.name: torch.zeros_like(s.parameter) for s in slots}):
        raise KeyError
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    assert all(isinstance(p, nn.Parameter) for p in net._flat_weights)


def test_arithmetic():
    a, b = {"x": torch.tensor([3.0, 4.0])}, {"x": torch.tensor([1.0, 2.0])}
    assert float(norm(a)) == 5.0
    assert float(dot(a, b)) == 11.0
    assert count(a) == 2


def test_injected_gradient_accumulates_scales_and_fires_hooks():
    w = torch.zeros(3, requires_grad=True)
    seen = []
    w.register_hook(lambda g: seen.append(g.clone()))
    given = torch.tensor([1.0, 2.0, 3.0])
    loss = inject(torch.tensor(5.0), [w], lambda scale: [given * scale])
    assert loss.item() == 5.0
    (loss / 4).backward()
    (2 * inject(torch.tensor(5.0), [w], lambda scale: [given * scale])).backward()
    assert torch.equal(w.grad, given * 2.25)
    assert len(seen) == 2


def test_injection_is_an_ordinary_node_for_autograd_grad_and_refuses_second_derivatives():
    w = torch.zeros(2, requires_grad=True)
    loss = inject(torch.tensor(1.0), [w], lambda scale: [torch.ones(2) * scale])
    (grad,) = torch.autograd.grad(loss, [w], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_the_graph_of_the_loss_is_cut():
    w = torch.ones(2, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    inject((w * other).sum(), [w], lambda scale: [torch.zeros(2)]).backward()
    assert other.grad is None
    assert torch.equal(w.grad, torch.zeros(2))
