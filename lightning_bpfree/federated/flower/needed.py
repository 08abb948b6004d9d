"""Checks that Flower is installed, and disables its telemetry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "UV_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""No telemetry, no look for updates, and no installation of packages while a run starts."""


def need_flower(*packages: str) -> None:
    """Raise ModuleNotFoundError, which names the extra, if Flower or another required package is not installed."""
    missing = [package for package in ("flwr", *packages) if find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f'{", ".join(missing)} not installed: pip install "lightning-bpfree[federated]"')


def quiet_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return environment variables (this process's for None) that disable the telemetry of Flower and Ray.

    Examples:
        >>> quiet_environment({"HOME": "/"})["FLWR_TELEMETRY_ENABLED"]
        '0'
    """
    return {**(os.environ if environment is None else environment), **QUIET}
