"""The process of each rule: it is started, read from, and ended with the command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_bpfree.cli.compare.plan import Contender

Event = dict[str, Any]
_RUNNING: set[subprocess.Popen[str]] = set()


def rule_events(plan: dict[str, Any], contender: Contender, budgets: dict[str, float], folder: Path) -> Iterator[Event]:
    """Run one rule's process, and yield its reports, including a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    config, log = folder / f"{contender.label}.yaml", folder / f"{contender.label}.log"
    config.write_text(contender.config, encoding="utf-8")
    spec = {**plan, "config": str(config), "forward_budgets": budgets}
    with tempfile.TemporaryDirectory() as temporary, log.open("w", encoding="utf-8") as errors:
        file = Path(temporary) / "spec.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        process = _started(file, errors)
        assert process.stdout is not None
        reported: Event = {"kind": "begin"}
        try:
            for line in process.stdout:
                reported = json.loads(line)
                yield reported
        except BaseException:
            _end(process)
            raise
        finally:
            process.stdout.close()
            code = process.wait()
            if process.stdin is not None:
                process.stdin.close()
            _RUNNING.discard(process)
    if reported["kind"] not in ("end", "refused", "fatal"):
        why = "was killed, most likely because memory ran out" if code == -9 else f"ended with code {code}"
        yield {"kind": "refused", "message": f"its process {why}: see {log}"}


def _started(spec: Path, errors: Any) -> subprocess.Popen[str]:
    """Start the process of a rule.

    Ctrl-C does not reach it, for it has a session of its own; it ends when its standard input is closed, which happens
    however this process ends.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_bpfree.cli.compare.worker", str(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    _RUNNING.add(process)
    return process


def end_all() -> None:
    """End the processes of all rules, and their data loading processes."""
    for process in list(_RUNNING):
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
