"""Every bad argument of everything public gets an error that names owner, argument and value; none is taken silently.

The arguments are made from the signatures (`bad_arguments.py`), so that a new class or argument is covered at once.
"""

from __future__ import annotations

import re

import pytest
from bad_arguments import Case, arguments, cases, evaluated, good, public

from lightning_bpfree.cli.main import main
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


RULE = """
trainer:
  callbacks:
    - class_path: lightning_bpfree.{rule}
      init_args: {{{given}}}
"""


@pytest.mark.parametrize(
    ("rule", "given", "said"),
    [
        ("ForwardGradient", "num_directions: 0", "num_directions=0: give a whole number of at least 1."),
        ("ForwardGradient", "num_directions: many", "num_directions='many': give a whole number of at least 1."),
        ("ForwardGradient", "num_direction: 2", "num_direction: there is no such argument; nearest: num_directions"),
        ("ForwardGradient", "guess: null, target: null", "target=None: give 'global', 'local' or a LocalLoss."),
        ("ZerothOrder", "sigma: .nan", "sigma=nan: give a positive number or None."),
        ("ZerothOrder", "scheme: forwrad", "scheme='forwrad': choose 'central' or 'forward'."),
        ("EvolutionStrategy", "maximize: perhaps", "maximize='perhaps': give True or False."),
        ("ForwardForward", "start_epoch: -1", "start_epoch=-1: give a whole number of at least 0."),
        ("LotteryTicket", "keep: 1.5", "keep=1.5: give a number in (0, 1)."),
    ],
)
def test_the_command_line_says_it_in_one_line(rule, given, said, tmp_path, monkeypatch, capsys):
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.yaml").write_text(RULE.format(rule=rule, given=given))
    assert main(["fit", "-c", "quickstart", "-c", "rule.yaml"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bpfree")]
    assert re.match(rf"bpfree fit: error: (rule\.yaml, line \d+: )?{re.escape(f'{rule}: {said}')}", line), line
