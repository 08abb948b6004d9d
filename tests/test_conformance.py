"""Every rule of the package holds to every property of `conformance.py`."""

from functools import partial

import pytest
from conformance import PROPERTIES

from lightning_bpfree import Backprop, ForwardGradient, ZerothOrder

RULES = {
    "backprop": Backprop,
    "forward_gradient_one": ForwardGradient,
    "forward_gradient_loop": partial(ForwardGradient, 3, chunk_size=1, orthogonal=True),
    "forward_gradient_vectorised": partial(ForwardGradient, 3, chunk_size=2, directions="rademacher"),
    "zeroth_order_central": partial(ZerothOrder, 2),
    "zeroth_order_forward": partial(ZerothOrder, 2, scheme="forward", directions="rademacher"),
}


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("make_rule", RULES.values(), ids=RULES.keys())
def test_rule(make_rule, holds):
    holds(make_rule)
