"""Every rule of the package holds to every property of `conformance.py`."""

import pytest
from conformance import PROPERTIES, Case
from shipped import cases, shipped_rules

RULES, VARIANTS, EXCEPTIONS = cases("RULES"), cases("VARIANTS"), cases("EXCEPTIONS")
SLOW = pytest.mark.slow


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("rule", [pytest.param(rule, marks=SLOW) if rule in VARIANTS else rule for rule in RULES])
def test_rule(rule, holds):
    if (rule, holds.__name__) not in EXCEPTIONS:
        holds(Case(RULES[rule]))


def test_no_rule_is_left_out():
    tried = {type(make()) for make in RULES.values()}
    assert set(shipped_rules()) <= tried
    names = {holds.__name__ for holds in PROPERTIES}
    assert all(rule in RULES and holds in names for rule, holds in EXCEPTIONS)
    assert VARIANTS.keys() <= RULES.keys()
