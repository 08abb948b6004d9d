"""The two kinds of binary units, for tests over all configurations of a team."""

from __future__ import annotations

import pytest

import lightning_bpfree as bpf


@pytest.fixture(params=["bernoulli", "sign"])
def unit(request):
    return bpf.Bernoulli("zero_one" if request.param == "bernoulli" else "plus_minus_one", temperature=1.5)
