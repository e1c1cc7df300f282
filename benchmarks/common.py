"""What every benchmark shares: the machine it ran on, how its result is printed, and what processes cost."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("streamforge", "confluent-kafka", "pyarrow", "pyiceberg", "msgspec", "picows", "numpy")
_MIB = 2**20


def machine() -> dict[str, Any]:
    """Describe the machine: without it a number means nothing."""
    return {
        "cores": psutil.cpu_count(),
        "model": _cpu_model(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "load_average_1m": round(os.getloadavg()[0], 2),
    }


def emit(benchmark: str, parameters: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Print a result as one JSON object on standard output, with the machine."""
    report = {
        "benchmark": benchmark,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "parameters": dict(parameters),
        "result": dict(result),
    }
    json.dump(report, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


@dataclass(slots=True)
class _Cost:
    """CPU seconds used before sampling began, and what was seen since."""

    first_cpu_s: float
    last_cpu_s: float
    peak_rss_bytes: int


@dataclass(slots=True)
class CostSampler:
    """Follows CPU and memory of named processes; a process that is restarted goes on under its name."""

    _seen: dict[tuple[str, int], _Cost] = field(default_factory=dict)
    _first_s: float | None = None
    _last_s: float = 0.0

    def sample(self, processes: Iterable[tuple[str, int]]) -> None:
        """Look at processes, given as (name, pid); one that has ended is left out."""
        self._last_s = time.monotonic()
        self._first_s = self._first_s or self._last_s
        for name, pid in processes:
            try:
                process = psutil.Process(pid)
                times, rss_bytes = process.cpu_times(), process.memory_info().rss
            except psutil.Error:
                continue
            cpu_s = times.user + times.system
            cost = self._seen.setdefault((name, pid), _Cost(cpu_s, cpu_s, rss_bytes))
            cost.last_cpu_s = cpu_s
            cost.peak_rss_bytes = max(cost.peak_rss_bytes, rss_bytes)

    def result(self) -> dict[str, dict[str, float]]:
        """Return CPU seconds a second (1.0 is one core) and the greatest memory of each name, over all samples."""
        wall_s = max(self._last_s - (self._first_s or 0.0), 1e-9)
        found: dict[str, dict[str, float]] = {}
        for (name, _), cost in self._seen.items():
            entry = found.setdefault(name, {"cpu_s_per_s": 0.0, "peak_rss_mib": 0.0})
            entry["cpu_s_per_s"] = round(entry["cpu_s_per_s"] + (cost.last_cpu_s - cost.first_cpu_s) / wall_s, 3)
            entry["peak_rss_mib"] = max(entry["peak_rss_mib"], round(cost.peak_rss_bytes / _MIB, 1))
        return found


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.machine())
