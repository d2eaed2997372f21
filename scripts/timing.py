"""Measures several implementations alternately, and compares them with the first."""

import resource
import statistics
import tempfile
import time
from pathlib import Path


def measure_in_turn(implementations, runs):
    """One row per implementation with medians over its runs, and its ratio to the first implementation.

    implementations: {name: function of an empty folder that does the work}.
    """
    measured = {name: [] for name in implementations}
    for _ in range(runs):
        for name, work in implementations.items():
            with tempfile.TemporaryDirectory() as folder:
                measured[name].append(measure(work, Path(folder)))
    rows = [
        {"name": name, **{key: statistics.median(run[key] for run in runs) for key in runs[0]}, "runs": runs}
        for name, runs in measured.items()
    ]
    for row in rows:
        for key in ("seconds", "cpu_seconds"):
            ratios = [run[key] / first[key] for run, first in zip(row["runs"], rows[0]["runs"], strict=True)]
            row[f"{key}_ratio"] = statistics.median(ratios)
    return rows


def measure(work, folder):
    """Wall and CPU seconds of work(folder), its ended child processes included, or those that it returns in a dict."""
    cpu = _cpu_seconds()
    start = time.perf_counter()
    own = work(folder)
    used = {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}
    return own if isinstance(own, dict) else used


def _cpu_seconds():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)
