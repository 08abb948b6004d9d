"""The structure of the package: floors of imports, optional packages, sizes, and what belongs to every rule."""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_bpfree as bpf

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_bpfree"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# A folder may import from lower floors and from itself. Front doors (`__init__`, `functional`) gather names from all
# below; nothing under the command line, which is a user of the package like any other, comes in through them.
FLOORS = {"core": 0, "training": 1, "methods": 2, "federated": 2, "demos": 3, "cli": 4}
FRONT_DOORS = {"lightning_bpfree", "lightning_bpfree.functional", "lightning_bpfree.public"}
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
    "diffusers",
    "safetensors",
    "torchdiffeq",
    "PIL",
    "flwr",
    "ray",
    "cryptography",
    "dp_accounting",
]
METHODS = sorted(path for path in (PACKAGE / "methods").iterdir() if (path / "__init__.py").exists())
ENTRANCES = {"rule.py", "callback.py"}

LONGEST = 300  # lines of code: docstrings, comments and blank lines do not count
MOST_FILES = 20  # in one folder


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def in_repository(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def snake_case(class_name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name).lower()


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports: at its top, inside functions, and for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports relatively"
            # `from lightning_bpfree.cli import fit` imports a module, `from lightning_bpfree import X` a name
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [m for m in inner if (ROOT / f"{m.replace('.', '/')}.py").exists()] or [str(node.module)]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def lines_of_code(path: Path) -> int:
    text = path.read_text(encoding="utf-8")
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docs)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_down_the_floors(path):
    folder = path.relative_to(PACKAGE).parts[0]
    if folder not in FLOORS:
        assert folder in ("__init__.py", "functional.py", "public.py"), "a new place: give it a floor"
        return
    for module in imported(path):
        parts = module.split(".")
        if folder == "core":
            assert parts[0] not in ("lightning", "torchmetrics", "pytorch_lightning"), f"{name(path)} imports {module}"
        if parts[0] != "lightning_bpfree":
            continue
        if module in FRONT_DOORS:
            assert folder == "cli", f"{name(path)} comes in through the front door {module}"
            continue
        assert parts[1] == folder or FLOORS[parts[1]] < FLOORS[folder], f"{name(path)} imports {module}"


@pytest.mark.parametrize("folder", METHODS, ids=name)
def test_a_method_stands_alone_and_has_one_entrance(folder):
    files = sorted(folder.rglob("*.py"))
    entrances = [path for path in files if path.name in ENTRANCES]
    assert len(entrances) == 1, "a method has one entrance: rule.py or callback.py"
    assert entrances[0].parent == folder
    entrance = ".".join(entrances[0].relative_to(ROOT).with_suffix("").parts)
    for path in files:
        for module in imported(path):
            parts = module.split(".")
            if parts[:2] == ["lightning_bpfree", "methods"]:
                assert parts[2] == folder.name, f"{name(path)} imports another method: {module}"
            assert module != entrance, f"{name(path)} imports the entrance of its folder: pass values instead"


@pytest.mark.parametrize("folder", METHODS, ids=name)
def test_a_method_is_named_after_its_public_class(folder):
    public = [kind for _, kind in inspect.getmembers(bpf, inspect.isclass)]
    entrances = [kind for kind in public if kind.__module__.split(".")[-1] + ".py" in ENTRANCES]
    named = [kind for kind in entrances if kind.__module__.split(".")[-2] == folder.name]
    assert [snake_case(kind.__name__) for kind in named] == [folder.name]
    assert (ROOT / f"docs/methods/{folder.name}.md").exists()


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=in_repository)
def test_files_stay_readable(path):
    assert lines_of_code(path) <= LONGEST


def test_folders_are_no_drawers():
    for folder in {path.parent for path in FILES}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, in_repository(folder)


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
    public = [value for _, value in inspect.getmembers(bpf, inspect.isclass)]
    return [kind for kind in public if issubclass(kind, bpf.TrainingRule) and not inspect.isabstract(kind)]


@pytest.mark.parametrize("rule", shipped_rules(), ids=lambda rule: rule.__name__)
def test_what_belongs_to_a_rule(rule):
    stem = snake_case(rule.__name__)
    assert rule.citation.startswith("@"), "BibTeX"
    assert "References:" in (inspect.getdoc(rule) or "")
    page = (ROOT / f"docs/methods/{stem}.md").read_text(encoding="utf-8")
    for heading in ("Recommended", "How to use it", "Arguments that matter", "Cost", "Verdict", "References"):
        assert f"\n## {heading}" in page, heading
    assert "Properties that are tested" in page  # a heading, or the summary of what is folded
    recipe = (ROOT / f"recipes/rules/{stem}.yaml").read_text(encoding="utf-8")
    assert f"class_path: lightning_bpfree.{rule.__name__}" in recipe
    assert f": {rule.__name__}" in page or f".{rule.__name__}" in page
    assert rule.__name__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
