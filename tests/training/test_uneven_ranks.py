"""Two ranks with different numbers of batches are told at once, where one would wait for the other for ever."""

from __future__ import annotations

import pytest
import uneven_worker
from ranks import outcomes, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two_processes")]  # processes that import torch and lightning


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    run_ranks(uneven_worker.__file__, "uneven", folder, limit=240)  # nobody waits for the process group's half hour
    return folder


@pytest.mark.parametrize("case", ["ddp_backprop", "ddp_zeroth", "scalar_zeroth"])
def test_uneven_numbers_of_batches_are_refused_at_once(out, case):
    for outcome in outcomes(out, case):
        assert "MisconfigurationException" in outcome["error"]
        assert "2, 3 training batches" in outcome["error"]
        assert "limit_train_batches=2" in outcome["error"]
