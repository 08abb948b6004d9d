"""The progress display of ``bpfree compare``: a bar, one line per run, and the remaining time."""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

from lightning_bpfree.cli.common.tables import console

if TYPE_CHECKING:
    from rich.progress import Progress


class RunsLeft:
    """Counts runs and estimates the remaining time.

    Args:
        left: number of remaining trainings of each rule, by label.
        metric: the metric that is compared.
        jobs: number of rules that train at the same time.
    """

    def __init__(self, left: dict[str, int], metric: str, jobs: int) -> None:
        self.left, self.metric, self.jobs = dict(left), metric, jobs
        self.total, self.done = sum(left.values()), 0
        self.seconds: dict[str, list[float]] = {}
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()
        self._bar = _bar()
        self._task = self._bar.add_task("compare", total=self.total)

    def __enter__(self) -> RunsLeft:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def begin(self, label: str, what: str) -> None:
        """Show the current task of a rule."""
        self._since.setdefault(label, time.perf_counter())
        self._bar.update(self._task, description=f"{label}: {what}")

    def end(self, label: str, what: str, event: dict[str, Any]) -> None:
        """Print the line of a run or trial, and count it.

        Args:
            label: label of the rule.
            what: which run of the rule.
            event: the report of the rule's process.
        """
        with self._lock:
            now = time.perf_counter()
            if not (event.get("kept") or event.get("reused")):
                self.seconds.setdefault(label, []).append(now - self._since.get(label, now))
            self._since[label] = now
            self.left[label] = max(0, self.left.get(label, 1) - 1)
            self.done += 1
            line = f"[{self.done}/{self.total}] {label}, {what}: {self._outcome(event)}"
            left = self.time_left()
            text = line if left is None else f"{line}; about {duration(left)} left"
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._bar.advance(self._task)

    def drop(self, label: str, missing: int) -> None:
        """Count the runs that a refused rule does not train."""
        with self._lock:
            self.left[label] = max(0, self.left.get(label, 0) - missing)
            self.total -= missing
            self._bar.update(self._task, total=self.total)

    def time_left(self) -> float | None:
        """Return the remaining seconds, estimated from the mean of each rule's runs; None before the first run."""
        known = [value for values in self.seconds.values() for value in values]
        if not known or not any(self.left.values()):
            return None
        overall = statistics.fmean(known)
        costs = (
            number * (statistics.fmean(self.seconds[label]) if label in self.seconds else overall)
            for label, number in self.left.items()
        )
        return sum(costs) / min(self.jobs, max(1, sum(number > 0 for number in self.left.values())))

    def _outcome(self, event: dict[str, Any]) -> str:
        if event["error"] is not None:
            return f"failed: {' '.join(event['error'].split())}"
        name = event.get("metric", self.metric)
        value = event.get("value", event.get("metrics", {}).get(name))
        said = f"{name} {'-' if value is None else f'{value:.4f}'}"
        if event.get("reused"):
            return f"{said}, the same run as by epochs"
        return f"{said}, kept from before" if event.get("kept") else said


def duration(seconds: float) -> str:
    """Return a duration in its largest units.

    Examples:
        >>> duration(42.3), duration(125), duration(7300)
        ('42 s', '2 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _bar() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console())
