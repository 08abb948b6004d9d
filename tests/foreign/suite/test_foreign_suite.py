"""Modules as other people write them, under every rule: trained right, or refused before the first step with a cure.

What is right is decided by a plain fit of the same module, to which the gradients of the rule's fit are given: it must
leave behind the same losses, metrics, buffers, attributes, random streams and states of optimizers, bit for bit under
Backprop, and up to the rounding of float64 under rules that evaluate a step several times. The true gradients, which
the plain fit finds at the very same parameters, tell whether an estimate is what it is said to be. Rules with losses of
their own are held to counts, to what must not move, and to the exact gradients behind their blocks.
"""

from __future__ import annotations

import pytest
from suite_cells import REFUSED, RIGHT, outcome
from suite_expected import EXPECTED
from suite_modules import CASES
from suite_rules import COMPANIONS, RULES
from thinned import in_turn

EVERY = [*RULES, *COMPANIONS]

# Each was wrong once, and its fault shows under few rules.
ALWAYS = {
    ("InnerBackward", "forward_gradient"),
    ("MomentumTeacher", "zeroth_order"),
    ("TeacherHidden", "evolution_strategy"),
    ("Grows", "feedback"),
    ("HookOnAModule", "forward_forward"),
    ("LabelsPopped", "team"),
    ("LabelsPopped", "local_loss"),
    ("NotRegistered", "zeroth_order"),
    ("TiedLanguageModel", "one_by_one"),
}


@pytest.mark.parametrize(("kind", "rule"), in_turn(CASES.values(), EVERY, fast=3, always=ALWAYS))
def test_trained_right_or_refused(kind, rule):
    found = outcome(kind, rule)
    letter = EXPECTED[kind.__name__][EVERY.index(rule)]
    assert found.kind == (RIGHT if letter == "+" else REFUSED), found.said


def test_the_suite_is_large():
    assert len(CASES) >= 60
    assert CASES.keys() == EXPECTED.keys()
    assert all(len(letters) == len(EVERY) for letters in EXPECTED.values())
    # A rule that refused everything would pass the others.
    for i, rule in enumerate(EVERY):
        trained = sum(letters[i] == "+" for letters in EXPECTED.values())
        assert trained >= {"reversible": 5}.get(rule, 40), (rule, trained)
