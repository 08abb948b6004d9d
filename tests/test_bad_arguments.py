"""Every bad argument of everything public gets an error that names owner, argument and value; none is taken silently.

The arguments are made from the signatures (`bad_arguments.py`), so that a new class or argument is covered at once.
"""

from __future__ import annotations

import pytest
from bad_arguments import Case, arguments, cases, evaluated, good, public

from lightning_bpfree.core.arguments import shown

TARGETS = public()
NEEDS = {"ControlModule": "gymnasium", "ActorCritic": "gymnasium", "VisionTransformer": "transformers"}
NEEDS |= {"SwinTransformer": "transformers", "RobertaEncoderLM": "transformers"}
NEEDS |= dict.fromkeys(["PipelineSampler", "RewardFineTuning", "DigitDiffusion"], "diffusers")
NEEDS |= {f"reversible_{name}": "transformers" for name in ("vit", "swin", "hiera", "roberta")}


def verdict(case: Case) -> str:
    """Return what became of a bad argument: "" for a clear error, or else what is wrong."""
    target = TARGETS[case.target]
    value = evaluated(case.value)
    try:
        target(**{**good(case.target, target), case.name: value})
    except (ValueError, TypeError) as error:
        message = str(error)
        if case.name not in arguments(target):  # misspelt
            near = case.name[:-1] in message.partition("nearest: ")[2]
            clear = f"{case.name}={case.value}: " in message and near
            if not hasattr(
                getattr(target, "__init__", target) if isinstance(target, type) else target, "__checked__"
            ):  # of Lightning, which looks for frames
                clear = f"unexpected keyword argument '{case.name}'" in message
        else:
            clear = isinstance(error, ValueError) and f"{case.name}={shown(value)}: " in message
        return "" if clear else f"{case}: {type(error).__name__}: {message}"
    except Exception as error:
        return f"{case}: {type(error).__name__}: {error}"
    return f"{case}: accepted"


@pytest.mark.parametrize("name", TARGETS)
def test_bad_arguments_are_named(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    found = [verdict(case) for case in cases(name, TARGETS[name])]
    assert [wrong for wrong in found if wrong] == []


def test_there_are_many():
    assert sum(1 for name, target in TARGETS.items() for _ in cases(name, target)) > 815
