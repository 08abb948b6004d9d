"""Detection of BatchNorm, which a federation of forward passes cannot use, and its replacement by GroupNorm."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lightning_bpfree.core.arguments import PositiveInt, checked


class Replaced(NamedTuple):
    """One layer that was replaced.

    Args:
        name: name of the layer in the module.
        before: its former class.
        channels: number of channels.
        groups: number of groups of the new GroupNorm.
        affine: whether the GroupNorm has a scale and a shift.
    """

    name: str
    before: str
    channels: int
    groups: int
    affine: bool

    def __str__(self) -> str:
        tail = "" if self.affine else ", without scale and shift"
        return f"{self.name}: {self.before}({self.channels}) -> GroupNorm({self.groups} groups{tail})"


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers of a module by name.

    Examples:
        >>> list(batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        ['1']
    """
    return {n: part for n, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}


def check_no_batch_norm(module: nn.Module) -> None:
    """Raise ValueError if a module has a BatchNorm layer."""
    found = batch_norms(module)
    if found:
        raise ValueError(
            f"module={type(module).__name__}: BatchNorm in {', '.join(found)}: its statistics differ from client to "
            "client and move with every evaluation. Call lightning_bpfree.replace_batch_norm(module) before, or leave "
            "normalization out."
        )


@checked
def replace_batch_norm(module: nn.Module, groups: PositiveInt | None = None, affine: bool = False) -> list[Replaced]:
    """Replace every BatchNorm by a GroupNorm, in place, and return what was replaced.

    This changes the output of a trained network, since its statistics are lost. Convert before training.

    Args:
        module: the module.
        groups: groups per layer; None uses the larger of 2 and a sixteenth of the channels, adjusted to divide them.
        affine: whether the new layers have a trained scale and shift; the paper's do not.

    Raises:
        ValueError: if the channels of a layer cannot be divided into that many groups, or are not known yet.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64))
        >>> print(*replace_batch_norm(net))
        1: BatchNorm2d(64) -> GroupNorm(4 groups, without scale and shift)
    """
    report = []
    for name, norm in batch_norms(module).items():
        channels = int(norm.num_features)  # type: ignore[arg-type]  # an int of BatchNorm's
        wanted = groups or max(2, channels // 16)
        if channels < 1 or (groups is not None and channels % groups):
            raise ValueError(
                f"replace_batch_norm: groups={groups}: {name} has {channels} channels, which do not divide; give a "
                "divisor, or None. A lazy layer must have seen a batch."
            )
        fitting = next(g for g in range(min(wanted, channels), 0, -1) if channels % g == 0)
        owner = module.get_submodule(name.rpartition(".")[0])
        new = nn.GroupNorm(fitting, channels, eps=float(norm.eps), affine=affine)  # type: ignore[arg-type]
        place = next((p.device for p in module.parameters()), None)
        setattr(owner, name.rpartition(".")[2], new.to(place).train(norm.training))
        report.append(Replaced(name, type(norm).__name__, channels, fitting, affine))
    return report
