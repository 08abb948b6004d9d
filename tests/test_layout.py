"""The structure of the package: floors of imports, optional packages, sizes, and what belongs to every rule."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_bpfree as bpf

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_bpfree"
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder may import from lower floors and from itself. Front doors (`__init__`, `functional`) gather names from all
# below; nothing under the command line, which is a user of the package like any other, comes in through them.
FLOORS = {"core": 0, "nn": 1, "rules": 2, "callbacks": 3, "strategies": 3, "federated": 3, "demos": 4, "cli": 4}
FRONT_DOORS = {"lightning_bpfree", "lightning_bpfree.functional"}
OPTIONAL = [
    "jsonargparse",
    "rich",
    "sklearn",
    "matplotlib",
    "wandb",
    "transformers",
    "mnist1d",
    "gymnasium",
    "peft",
    "timm",
]

LONGEST = 300
# Files that are still longer, and why.
LONGER = {
    "rules/forward_forward.py": 335,  # a third of it are the arguments and their documentation
    "rules/team_reinforce.py": 360,  # a third of it are the arguments and their documentation
    "rules/training_rule.py": 345,  # the hooks of one callback, which belong together; its helpers have moved out
}


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports relatively"
            # `from lightning_bpfree.cli import fit` imports a module, `from lightning_bpfree import X` a name
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [m for m in inner if (ROOT / f"{m.replace('.', '/')}.py").exists()] or [str(node.module)]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_down_the_floors(path):
    folder = path.relative_to(PACKAGE).parts[0]
    if folder not in FLOORS:
        assert folder in ("__init__.py", "functional.py"), "a new place: give it a floor"
        return
    for module in imported(path):
        if module.split(".")[0] != "lightning_bpfree":
            continue
        if module in FRONT_DOORS:
            assert folder == "cli", f"{name(path)} comes in through the front door {module}"
            continue
        other = module.split(".")[1]
        assert other == folder or FLOORS[other] < FLOORS[folder], f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_stay_readable(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER.get(name(path), LONGEST)


def test_exceptions_of_size_are_still_needed():
    for path, limit in LONGER.items():
        assert LONGEST < len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) <= limit, path


@pytest.mark.slow  # a process that imports torch and lightning
def test_importing_needs_torch_and_lightning_only():
    code = f"""
import importlib.metadata, importlib.util, sys

missing = {OPTIONAL!r}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in missing else self.finder.find_spec(fullname, path, target)

def distribution(distribution_name):  # lightning asks for versions before it imports
    if distribution_name.replace("-", "_") in [*missing, "scikit_learn"]:
        raise importlib.metadata.PackageNotFoundError(distribution_name)
    return found(distribution_name)

found, importlib.metadata.distribution = importlib.metadata.distribution, distribution
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
assert not any(map(importlib.util.find_spec, missing))
import lightning_bpfree, lightning_bpfree.functional, lightning_bpfree.cli, lightning_bpfree.demos.modules
assert lightning_bpfree.cli.main(["recipes", "list"]) == 0
assert not set(missing) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def shipped_rules() -> list[type[bpf.TrainingRule]]:
    public = [value for value in vars(bpf).values() if inspect.isclass(value)]
    return [kind for kind in public if issubclass(kind, bpf.TrainingRule) and not inspect.isabstract(kind)]


@pytest.mark.parametrize("rule", shipped_rules(), ids=lambda rule: rule.__name__)
def test_what_belongs_to_a_rule(rule):
    stem = rule.__module__.rpartition(".")[2]
    assert rule.citation.startswith("@"), "BibTeX"
    assert "References:" in (inspect.getdoc(rule) or "")
    page = (ROOT / f"docs/rules/{stem}.md").read_text(encoding="utf-8")
    for heading in (
        "Claim",
        "How to use it",
        "Cost and memory",
        "Properties that are tested",
        "Recommended",
        "Results",
    ):
        assert f"\n## {heading}" in page, heading
    recipe = (ROOT / f"recipes/rules/{stem}.yaml").read_text(encoding="utf-8")
    assert f"class_path: lightning_bpfree.{rule.__name__}" in recipe
    assert f": {rule.__name__}" in page or f".{rule.__name__}" in page
    assert rule.__name__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
