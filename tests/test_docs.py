"""The documentation is true: its code runs, its YAML fits the classes, and its commands, links and tests exist."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import lightning_bpfree as bpf
from lightning_bpfree import functional
from lightning_bpfree.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md"]

BLOCK = re.compile(
    r"(?:^<!-- skip:(?P<reason>[^\n]*)-->\n\n?)?^(?P<fence>```+)(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
TEST = re.compile(r"`tests/(?P<file>[\w/]+\.py)(?:::(?P<name>\w+))?`")


class Block(NamedTuple):
    language: str
    code: str
    line: int
    reason: str | None


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] == language:
            yield Block(language, found["code"], text.count("\n", 0, found.start("code")) + 1, found["reason"])


def with_code(language: str) -> pytest.MarkDecorator:
    pages = [page for page in ALL_PAGES if any(blocks(page, language))]
    return pytest.mark.parametrize("page", pages, ids=name)


# --- code ---


@pytest.mark.slow  # short trainings
@with_code("python")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*:UserWarning")  # several fits on one page
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, in one namespace and an empty folder, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    for key in os.environ:  # Trainers leave ranks and seeds there
        if key.startswith("PL_") or key.endswith("_RANK"):
            monkeypatch.delenv(key)
    module = types.ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)  # where dataclasses and pickles look for what blocks define
    for block in blocks(page, "python"):
        if block.reason is not None:
            assert block.reason.strip(), f"{name(page)}:{block.line} is skipped without a reason"
            continue
        code = "\n" * (block.line - 1) + block.code  # tracebacks show the page's line
        exec(compile(code, str(page), "exec"), module.__dict__)


@with_code("yaml")
def test_yaml_parses_and_fits_the_classes(page):
    for block in blocks(page, "yaml"):
        for node in walk(yaml.safe_load(block.code)):
            path = node.get("class_path", "")
            kind = getattr(bpf, path.removeprefix("lightning_bpfree."), None)
            if kind is None:
                continue
            signatures = [inspect.signature(part.__init__) for part in kind.__mro__]
            known = {key for signature in signatures for key in signature.parameters}
            unknown = node.get("init_args", {}).keys() - known
            assert not unknown, f"{name(page)}:{block.line}: {path} has no {unknown}"


def walk(node: object) -> Iterator[dict]:
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from walk(child)


@with_code("bash")
def test_commands_exist(page):
    for block in blocks(page, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            places = [i for i, word in enumerate(words) if word.rpartition("/")[2] == "bpfree"]
            for command, *arguments in (words[i + 1 :] for i in places):
                assert command in COMMANDS or command.startswith("--"), f"{name(page)}: {line}"
                for recipe in recipes_in(arguments):
                    assert list(ROOT.glob(f"recipes/{recipe}.yaml")), f"{name(page)}: no recipe {recipe}"


def recipes_in(arguments: list[str]) -> list[str]:
    plain = [argument.removeprefix("recipes/").removesuffix(".yaml") for argument in arguments]
    folders = ("rules/", "loggers/", "papers/")
    return [word for word in plain if word == "quickstart" or word.startswith(folders)]


# --- what pages refer to ---


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_links_exist(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.finditer(text):
        target, _, anchor = found["target"].partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name(page)} links to {found['target']}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name)
def test_tests_that_pages_name_exist(page):
    for found in TEST.finditer(page.read_text(encoding="utf-8")):
        file = ROOT / "tests" / found["file"]
        assert file.exists(), f"{name(page)}: {found[0]}"
        functions = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert found["name"] is None or found["name"] in functions, f"{name(page)}: {found[0]}"


@pytest.mark.parametrize("page", [*sorted((DOCS / "methods").glob("*.md")), DOCS / "training/scalar_sync.md"], ids=name)
def test_rules_are_backed_by_tests(page):
    assert len([found for found in TEST.finditer(page.read_text(encoding="utf-8")) if found["name"]]) >= 3


def test_public_names_are_documented():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for key, value in inspect.getmembers(bpf):
        if inspect.isclass(value) or inspect.isfunction(value):
            assert re.search(rf"\b{key}\b", pages), f"no page names {key}"
    exported = {name.rpartition(".")[2] for name in loaded("hooks").exported(ROOT / "lightning_bpfree/functional.py")}
    assert exported == {key for key, value in vars(functional).items() if callable(value)}
    documented = {name.rpartition(".")[2] for name in loaded("hooks").exported(ROOT / "lightning_bpfree/public.py")}
    assert documented == {
        key for key, value in inspect.getmembers(bpf) if inspect.isclass(value) or inspect.isfunction(value)
    }


def test_the_new_rule_is_checked():
    """`test_python_runs` runs the page, and with it `check_rule`; here, that the page leaves out no rule."""
    code = "\n".join(block.code for block in blocks(DOCS / "new_rule.md", "python") if block.reason is None)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    checked = {call.args[0].id for call in calls if getattr(call.func, "id", None) == "check_rule"}
    classes = [node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    bases = {"TrainingRule", "NetworkRule"}
    rules = {node.name for node in classes if bases & {getattr(base, "id", None) for base in node.bases}}
    assert len(rules) == 2
    assert checked == rules


# --- results ---


def loaded(stem: str) -> types.ModuleType:
    specification = importlib.util.spec_from_file_location(f"docs_{stem}", DOCS / f"{stem}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_results_are_those_of_the_files():
    assert loaded("make_results").main(["--check"]) == 0, "run python docs/make_results.py"


ROW = {"label": "backprop", "mean": 0.95, "ci95": 0.01, "gap": 0.0, "forward_evals": 1260.0, "seconds": 1.5}
ROW |= {"peak_memory_mib": None, "mean_cosine": None, "error": None}
FAILED = {**dict.fromkeys(ROW), "label": "broken", "error": "no slope | anywhere\nat all"}
COMPARISON = {
    "command": ["bpfree", "compare", "-c", "mine.yaml", "--rules", "my rule.yaml"],
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.13.0"},
    "machine": {"threads": 1},
    "metric": "test_acc",
    "seeds": [0, 1, 2],
    "tuning_metric": "val_acc",
    "tuning_seed": 1000,
    "rules": [{"chosen": {"lr": "0.1"}, "label": "backprop"}, {"label": "broken"}],
    "summary": {"epochs": [ROW, FAILED]},
}
BENCHMARKS = {"command": "run", "date": "2026-01-02", "versions": {"torch": "2.13.0"}, "device": "cpu"}
BENCHMARKS["rows"] = [
    {"name": "zeroth order", "unit": "x", "value": 1.25, "limit": 1.1, "reached": False, "what": "time"},
    {"name": "memory", "unit": "B", "value": 12345.0, "limit": None, "reached": None, "what": "peak"},
]


def test_results_are_written_once_and_seen_to_be_stale(tmp_path, monkeypatch, capsys):
    made = loaded("make_results")
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    (docs / "img").mkdir()
    monkeypatch.setattr(made, "DOCS", docs)
    monkeypatch.setattr(made, "RESULTS", docs / "results")
    monkeypatch.setattr(made, "IMAGES", docs / "img")
    (tmp_path / "README.md").write_text("<!-- results:one_comparison -->\n<!-- /results -->\nkept\n")
    page = docs / "page.md"
    page.write_text("<!-- results:benchmarks:zeroth -->\nold\n<!-- /results -->\n")

    assert made.main(["--check"]) == 1
    assert "old" in page.read_text()  # looked at, and not touched
    assert made.main([]) == 0
    assert "Not measured yet." in page.read_text()
    assert made.main(["--check"]) == 0

    made.RESULTS.joinpath("one_comparison.json").write_text(made.json.dumps(COMPARISON))
    made.RESULTS.joinpath("benchmarks.json").write_text(made.json.dumps(BENCHMARKS))
    assert made.main(["--check"]) == 1
    assert made.main([]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.endswith("kept\n")
    assert "| `backprop` | 0.9500 ± 0.0100 | +0.0000 | 1,260 | 1.5 | – | – |" in text
    assert "| `broken` | failed |" in text
    assert "`bpfree compare -c mine.yaml --rules 'my rule.yaml'`, 2026-01-02" in text
    assert "(docs/img/one_comparison.png)" in text
    assert "1.25 x | 1.1 | **missed**" in page.read_text()
    assert "12,345" not in page.read_text()
    assert made.main(["--check"]) == 0

    changed = {**COMPARISON, "seeds": [0]}
    made.RESULTS.joinpath("one_comparison.json").write_text(made.json.dumps(changed))
    capsys.readouterr()
    assert made.main(["--check"]) == 1
    assert {"README.md", "docs/img/one_comparison.png"} <= {
        line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()
    }
