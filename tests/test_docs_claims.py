"""Pages are right about recipes and arguments: quoted YAML is in the recipe, defaults are those of the signature."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_bpfree as bpf

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

YAML = re.compile(r"^```yaml\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPE = re.compile(r"\brecipes/[\w/]+\.yaml")
ARGUMENTS = re.compile(r"<!-- arguments of (?P<name>\w+) -->\n+(?P<table>(?:\|.*\n)+)")
CODE = re.compile(r"`([^`]+)`")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def quotations() -> Iterator[Any]:
    """Blocks whose first line is a comment that names a recipe."""
    for page in PAGES:
        for found in YAML.finditer(page.read_text(encoding="utf-8")):
            first = found["code"].partition("\n")[0]
            recipe = RECIPE.search(first) if first.startswith("#") else None
            if recipe is not None:
                yield pytest.param(found["code"], recipe[0], id=f"{name(page)}:{recipe[0]}")


@pytest.mark.parametrize(("code", "recipe"), quotations())
def test_quoted_yaml_is_in_the_recipe(code: str, recipe: str) -> None:
    whole = yaml.safe_load((ROOT / recipe).read_text(encoding="utf-8"))
    assert contained(yaml.safe_load(code), whole), f"{recipe} says something else than\n{code}"


def contained(part: object, whole: object) -> bool:
    """Whether all that `part` says is said by `whole`, at the same place; each item of a list by one of its items."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contained(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and all(any(contained(one, other) for other in whole) for one in part)
    return type(part) is type(whole) and part == whole


def documented() -> Iterator[Any]:
    for page in PAGES:
        for found in ARGUMENTS.finditer(page.read_text(encoding="utf-8")):
            yield pytest.param(found["name"], found["table"], id=f"{name(page)}:{found['name']}")


def said(table: str) -> Iterator[tuple[str, str | None]]:
    """Arguments of a table and what their first column says of their defaults."""
    for row in table.splitlines()[2:]:
        for entry in CODE.findall(row.split("|")[1]):
            argument, sign, default = entry.partition("=")
            yield argument, default if sign else None


@pytest.mark.parametrize(("owner", "table"), documented())
def test_documented_defaults_are_those_of_the_signature(owner: str, table: str) -> None:
    kind = getattr(bpf, owner)
    signatures = [inspect.signature(part.__init__) for part in reversed(kind.__mro__)]  # a subclass comes last
    defaults = {key: given.default for one in signatures for key, given in one.parameters.items()}
    for argument, default in said(table):
        if argument == "on_nonfinite":  # rules pass it on among their settings, some with another default
            assert ast.literal_eval(str(default)) == kind().on_nonfinite, f"{owner}({argument}={kind().on_nonfinite!r})"
            continue
        assert argument in defaults, f"{owner} has no {argument}"
        if default is not None:
            value = ast.literal_eval(default)
            assert (type(value), value) == (type(defaults[argument]), defaults[argument]), f"{owner}({argument})"


def test_there_are_claims() -> None:
    """So that a change of form does not hide them from the tests above."""
    owners = {parameter.values[0] for parameter in documented()}
    assert owners >= {"EvolutionStrategy", "ZerothOrder", "TeamReinforce", "ReversibleRecompute", "LotteryTicket"}
    assert {parameter.values[1] for parameter in quotations()} >= {
        f"recipes/rules/{rule}.yaml" for rule in ("evolution_strategy", "zeroth_order", "team_reinforce")
    }


def test_a_false_claim_is_found() -> None:
    whole = {"a": [{"class_path": "x", "init_args": {"n": 64, "m": None}}]}
    assert contained({"a": [{"class_path": "x", "init_args": {"n": 64}}]}, whole)
    for wrong in ({"n": 16}, {"n": True}, {"k": 64}):
        assert not contained({"a": [{"class_path": "x", "init_args": wrong}]}, whole)
    table = "| argument | meaning |\n|---|---|\n| `num_directions=16` | K |\n"
    assert list(said(table)) == [("num_directions", "16")]
    with pytest.raises(AssertionError, match="num_directions"):
        test_documented_defaults_are_those_of_the_signature("ZerothOrder", table)
