"""One thread: small tensors gain nothing from two, and parallel runs of the suite would fight for them."""

import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# Modules beside the tests (problems, workers of two ranks) are imported by their name: from tests, from the processes
# that these start, and as class paths in YAML. Their names are unique over all folders.
_WITH_MODULES = {str(path.parent) for path in TESTS.rglob("*.py") if path.parent.name != "benchmarks"}
FOLDERS = [str(TESTS), *sorted(_WITH_MODULES - {str(TESTS)})]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
torch.set_num_threads(1)


class Seeded:
    """Every test starts from one seed, the examples in docstrings too, which fixtures of this folder do not reach."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Seeded(), "seeded")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
