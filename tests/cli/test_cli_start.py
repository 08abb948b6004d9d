"""The command starts without torch where it can, helps with examples, and completes in the shell."""

from __future__ import annotations

import ast
import contextlib
import inspect
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

import lightning_bpfree as bpf
from lightning_bpfree.cli import main
from lightning_bpfree.cli.commands import COMMANDS
from lightning_bpfree.cli.common import recipes

HEAVY = ("torch", "lightning", "pytorch_lightning", "jsonargparse", "rich", "matplotlib", "numpy")
LIGHT = [
    *(["--version"], ["--help"], ["recipes", "list"], ["recipes", "show", "quickstart"], ["metrics", "--help"]),
    *([name, "--help"] for name in COMMANDS if name != "metrics"),
]


@pytest.mark.slow
def test_what_only_prints_text_imports_neither_torch_nor_lightning() -> None:
    code = f"""
import sys
from lightning_bpfree.cli import main
for arguments in {LIGHT!r}:
    try:
        assert main(arguments) == 0
    except SystemExit as error:
        assert error.code == 0
    assert not set(sys.modules) & set({HEAVY!r}), (arguments, set(sys.modules) & set({HEAVY!r}))
import lightning_bpfree
assert lightning_bpfree.ZerothOrder.__module__ == "lightning_bpfree.methods.zeroth_order.rule"
assert "torch" in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_first_name_brings_all_of_them() -> None:
    names = dir(bpf)
    assert "ForwardGradient" in names
    assert "__version__" in names
    namespace: dict[str, object] = {}
    exec("from lightning_bpfree import *", namespace)
    assert {name for name in names if not name.startswith("_")} <= namespace.keys()
    assert all(inspect.isclass(value) or callable(value) for _, value in inspect.getmembers(bpf, inspect.isclass))
    with pytest.raises(AttributeError, match="has no attribute 'ForwardGradiet'"):
        bpf.ForwardGradiet  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_are_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # as argparse ends
        assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    lines = text.partition("examples:\n")[2].splitlines()
    assert lines
    assert all(line.split()[:2] == ["bpfree", name] for line in lines)
    assert len(text.splitlines()) < 60, "short"


def test_all_options_of_fit_are_behind_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help-all"])
    assert "--trainer.gradient_clip_algorithm" in capsys.readouterr().out


def test_a_command_is_one_line_of_a_table() -> None:
    for row in COMMANDS.values():
        assert callable(resolve_name(row.run))
        assert not row.options or callable(resolve_name(row.options))
    files = (Path(inspect.getfile(main)), Path(inspect.getfile(resolve_name("lightning_bpfree.cli.commands"))))
    for file in files:
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "torch" not in ast.dump(ast.Module(top, []))


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from lightning_bpfree.cli import main; sys.exit(main(['recipes', 'list']))"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    with writer.stderr:
        assert writer.stderr.read() == b""
    writer.wait(60)


# --- completion ---

TRY = """
source {script}
try() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMPREPLY=()
    function=$(complete -p bpfree | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    $function bpfree "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
    echo "${{COMPREPLY[@]}}"
}}
try bpfree comp
try bpfree compare --se
try bpfree fit -c quick
try bpfree fit --trainer.max_
try bpfree recipes sh
try bpfree compare --rules rules/forward_g
"""


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_the_shell_completes_commands_options_and_recipes(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for expected in ("compare", "--trainer.max_epochs", "--overwrite"):
        # tcsh lists options behind one pattern of their dashes, 'c/--/(...)/'.
        assert (expected.removeprefix("--") if shell == "tcsh" else expected) in text
    if shell != "bash":
        return
    Path("complete.bash").write_text(text)
    script = TRY.format(script="complete.bash")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    commands, seeds, recipe, trainer, action, rules = done.stdout.splitlines()
    assert commands.split() == ["compare", "completion"]
    assert seeds == "--seeds"
    assert recipe == "quickstart"
    assert {"--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"} <= set(trainer.split())
    assert action == "show"
    assert rules == "rules/forward_gradient"
    assert "rules/forward_gradient" in recipes.names()


def test_completion_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lightning_bpfree.cli.common.preconditions.find_spec", lambda _: None)
    assert main(["completion", "bash"]) == 2
    assert 'pip install "lightning-bpfree[completion]"' in capsys.readouterr().err
