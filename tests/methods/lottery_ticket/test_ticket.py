"""Tickets fit or say why not, travel through files bit for bit, and to and from torch's pruning format."""

import pytest
import torch
from problems import Tied
from torch import nn
from torch.nn.utils import prune

from lightning_bpfree.methods.lottery_ticket.masks import Masks
from lightning_bpfree.methods.lottery_ticket.pruning import magnitude, top_masks
from lightning_bpfree.methods.lottery_ticket.ticket import Ticket


def params_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def ticket_of(module: nn.Module, sparsity: float = 0.5, **fields) -> Ticket:
    params = params_of(module)
    masks = top_masks(magnitude({n: p for n, p in params.items() if p.dim() > 1}), sparsity, scope="layer")
    return Ticket(masks, params, buffers=dict(module.named_buffers()), **fields)


def assert_same(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    else:
        assert a == b


def test_a_file_gives_everything_back(tmp_path):
    net = Tied()
    moved = {name: p + 1 for name, p in params_of(net).items()}
    std = {name: p.abs() for name, p in moved.items() if p.dim() > 1}
    ticket = ticket_of(
        net,
        level=3,
        mean=moved,
        std=std,
        mean_buffers=dict(net.named_buffers()),
        metrics={"acc": 0.5},
        info={"a": None},
    )
    path = tmp_path / "new" / "ticket.pt"
    ticket.save(path)
    again = Ticket.load(path)
    assert_same(vars(ticket), vars(again))
    assert [p.name for p in path.parent.iterdir()] == ["ticket.pt"]
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds no ticket"):
        Ticket.load(tmp_path / "other.pt")


@pytest.mark.parametrize("weights", ["init", "mean"])
def test_apply_sets_everything_in_place_bit_for_bit(weights):
    net = Tied()
    trained = {name: p * 1.1 for name, p in params_of(net).items()}
    later = {name: b + 2 for name, b in net.named_buffers()}
    ticket = ticket_of(net, mean=trained, mean_buffers=later)
    before, buffers = params_of(net), {name: b.clone() for name, b in net.named_buffers()}
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            tensor.add_(5)
    objects = dict(net.named_parameters())
    ticket.apply_to(net, weights)
    expected = before if weights == "init" else trained
    for name, parameter in net.named_parameters():
        assert parameter is objects[name]
        survivor = ticket.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, torch.where(survivor, expected[name], 0.0))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name] if weights == "init" else later[name])


def test_a_ticket_holds_copies():
    net = nn.Linear(3, 2)
    ticket = ticket_of(net)
    with torch.no_grad():
        net.weight.zero_()
    assert ticket.init["weight"].abs().sum() > 0


def test_a_mismatch_lists_names_and_both_shapes():
    ticket = ticket_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    before = params_of(other)
    with pytest.raises(ValueError, match="does not fit Sequential") as error:
        ticket.apply_to(other)
    message = str(error.value)
    for part in ("0.weight (4, 3) | (5, 3)", "0.bias (4,) | (5,)", "1.weight (2, 4) | (2, 5)", "1.bias (2,) | missing"):
        assert part in message
    assert_same(before, params_of(other))
    with pytest.raises(ValueError, match=r"0\.weight \(4, 3\) \| \(5, 3\)"):
        ticket.to_torch_pruning(other)
    with pytest.raises(ValueError, match=r"Masks and init.*w \(2,\) \| missing"):
        Ticket(Masks({"w": torch.ones(2) > 0}), {})
    norm = nn.BatchNorm1d(2)
    masked = Masks({"weight": torch.tensor([True, False])})
    wrong = Ticket(masked, params_of(norm), buffers={"running_mean": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"running_mean \(3,\) \| \(2,\)"):
        wrong.apply_to(norm)


def test_other_bad_input():
    ticket = ticket_of(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no trained weights"):
        ticket.apply_to(nn.Linear(3, 2), "mean")
    with pytest.raises(ValueError, match="weights='last'"):
        ticket.apply_to(nn.Linear(3, 2), "last")
    with pytest.raises(ValueError, match=r"Nothing in Linear is pruned"):
        Ticket.from_torch_pruning(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(Tied, (5, 6)), (lambda: nn.LSTM(3, 4), (5, 2, 3)), (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 5))],
    ids=["tied", "lstm", "conv"],
)
def test_export_computes_the_same_and_comes_back(make, shape):
    net = make().eval()
    ticket = ticket_of(net)
    ticket.apply_to(net)
    x = torch.randn(shape)

    def run():
        out = net(x)
        return out[0] if isinstance(out, tuple) else out

    before = run()
    ticket.to_torch_pruning(net)
    assert torch.equal(run(), before)
    assert prune.is_pruned(net)
    back = Ticket.from_torch_pruning(net, level=2)
    assert back.masks == ticket.masks
    assert back.level == 2
    assert back.init.keys() == ticket.init.keys()
    fresh = make().eval()
    back.apply_to(fresh)
    assert_same(params_of(fresh), back.init)
    for name, tensor in back.init.items():
        mask = ticket.masks.get(name)
        assert torch.equal(tensor, ticket.init[name] if mask is None else ticket.init[name] * mask)


def test_import_of_a_trained_module_keeps_the_first_initialization():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    init = params_of(net)
    prune.random_unstructured(net[0], "weight", amount=0.5)
    with torch.no_grad():
        net[0].weight_orig.add_(1)
    ticket = Ticket.from_torch_pruning(net, init, metrics={"loss": 1.0})
    assert_same(ticket.init, init)
    assert torch.equal(ticket.mean["0.weight"], init["0.weight"] + 1)
    assert list(ticket.masks) == ["0.weight"]
    assert not ticket.mean_buffers
    assert torch.equal(ticket.masks["0.weight"].float(), net[0].weight_mask)
