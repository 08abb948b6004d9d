"""What the package ships, derived from the package: no test outside of a method's own files lists rules by hand.

Rules are the public ones; their recipes are found by their names. What is peculiar to a method (settings worth trying,
what it refuses on purpose) is said in a module of its own beside its tests,
``tests/methods/<method>/cases_of_<method>.py``:

    RULES        the rule in its settings, by name, for the properties of `conformance.py`
    VARIANTS     names among them that are nearly another one, and wait for the slow set
    EXCEPTIONS   (name, property) -> why the rule does otherwise
    ANY_MODULE   rules that train modules of any structure, for `tests/foreign`
    KILLED       (rule, settings of the Trainer) that `tests/resume_worker.py` kills inside an epoch
    RANKS, LOCAL_RANKS, SHARED_RANKS, POPULATION_RANKS   rules that `tests/training/worker.py` runs on two ranks

Each of these is optional but RULES.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import lightning_bpfree as bpf

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes/rules"


def shipped_rules() -> list[type[bpf.TrainingRule]]:
    """Return all public rules that can be made."""
    public = [value for _, value in inspect.getmembers(bpf, inspect.isclass)]
    return [kind for kind in public if issubclass(kind, bpf.TrainingRule) and not inspect.isabstract(kind)]


def network_rules() -> list[type[bpf.TrainingRule]]:
    """Return those that need a network of several layers: they work on its blocks, or in its place."""
    return [kind for kind in shipped_rules() if issubclass(kind, bpf.NetworkRule)]


def method_of(rule: type) -> str:
    """Return the name of a rule's folder, page and recipe."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", rule.__name__).lower()


def recipe_of(rule: type) -> str:
    """Return the name of the recipe that adds a rule to a configuration."""
    return f"rules/{method_of(rule)}"


def cases(name: str) -> dict[Any, Any]:
    """Return what the methods' own case modules say under ``name``, put together; keys must differ."""
    found: dict[Any, Any] = {}
    for path in sorted(TESTS.glob("methods/*/cases_of_*.py")):
        own = getattr(importlib.import_module(path.stem), name, {})
        own = own if isinstance(own, dict) else dict.fromkeys(own, path.stem)
        assert not found.keys() & own.keys(), f"{path.stem}.{name} repeats {found.keys() & own.keys()}"
        found.update(own)
    return found
