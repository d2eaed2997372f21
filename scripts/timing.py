"""Times contestants in turn, several runs each, and compares them with the first."""

import resource
import statistics
import tempfile
import time
from pathlib import Path


def in_turn(contestants, runs):
    """Rows of medians over runs of each contestant, a row each: the first is what the others are compared with.

    contestants: {name: function of a fresh folder that does the work}.
    """
    measured = {name: [] for name in contestants}
    for _ in range(runs):
        for name, work in contestants.items():
            with tempfile.TemporaryDirectory() as folder:
                measured[name].append(measure(work, Path(folder)))
    rows = [
        {"name": name, **{key: statistics.median(each[key] for each in runs) for key in runs[0]}, "runs": runs}
        for name, runs in measured.items()
    ]
    for row in rows:
        for key in ("seconds", "cpu_seconds"):
            ratios = [a[key] / b[key] for a, b in zip(row["runs"], rows[0]["runs"], strict=True)]
            row[f"{key}_ratio"] = statistics.median(ratios)
    return rows


def measure(work, folder):
    """Wall and CPU seconds of work(folder), with all processes that it starts and ends, or those that it says."""
    before, start = _cpu_seconds(), time.perf_counter()
    said = work(folder)
    used = {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - before}
    return said if isinstance(said, dict) else used


def _cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
