"""Throughput and peak memory of training batches."""

from __future__ import annotations

import time

import torch

from lightning_bpfree.training.measurement.peak_memory import peak_mib, reset_peak


class Throughput:
    """Measures time and memory of consecutive training batches.

    Examples:
        >>> meter, cpu = Throughput(), torch.device("cpu")
        >>> meter.open(cpu)
        >>> meter.samples += 32
        >>> meter.close(cpu, ranks=1)["bpfree/samples_per_second"] > 0
        True
    """

    def __init__(self) -> None:
        self.started: float | None = None
        self.samples = 0

    def open(self, device: torch.device) -> None:
        """Start measuring."""
        _wait(device)
        reset_peak(device)
        self.started, self.samples = time.perf_counter(), 0

    def close(self, device: torch.device, ranks: int) -> dict[str, float]:
        """Stop, and return metrics to log: samples per second over all ranks, and the peak in MiB if known."""
        _wait(device)
        assert self.started is not None, "close before open"
        values = {"bpfree/samples_per_second": ranks * self.samples / (time.perf_counter() - self.started)}
        peak = peak_mib(device)
        self.started = None
        return values if peak is None else {**values, "bpfree/peak_memory": peak}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
