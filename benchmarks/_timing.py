"""Timing on a machine that is never quiet, and the page where the results stand.

Subjects that are compared take turns in one process: each round times every subject once, forwards and backwards
in turn, so that a disturbance meets all of them. The ratio of two subjects is the median over the rounds of the
ratio within a round; beside it stands the ratio of their fastest rounds. Both should tell the same story.
"""

import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import date
from itertools import repeat
from pathlib import Path

import jax
import numpy as np

RESULTS = Path(__file__).parent / "RESULTS.md"


@contextmanager
def no_gc():
    """Keep the garbage collector from running in the middle of a round."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def turns(subjects: Sequence, rounds: int) -> Iterable[list[tuple[int, Callable]]]:
    """Yield the numbered subjects once a round, forwards and backwards: who follows whom matters."""
    numbered = list(enumerate(subjects))
    for i in range(rounds):
        yield numbered[:: -1 if i % 2 else 1]


def timed(subject: Callable, calls: int = 1) -> float:
    """Return the seconds that one call takes, of so many in a row; what was computed is waited for."""
    out, begin = None, time.perf_counter()
    for _ in repeat(None, calls):
        out = subject()
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls


def steady(*subjects: Callable, rounds: int = 80, length: float = 5e-3) -> list[list[float]]:
    """Return for each subject the seconds a call, one entry a round; a round of a subject lasts ``length``."""
    for subject in subjects:
        timed(subject, 5)
    calls = [max(1, round(length / timed(subject, 5))) for subject in subjects]
    times: list[list[float]] = [[] for _ in subjects]
    with no_gc():
        for order in turns(subjects, rounds):
            for i, subject in order:
                times[i].append(timed(subject, calls[i]))
    return times


def first(*makers: Callable[[], Callable], rounds: int) -> tuple[list[list[float]], list[Callable]]:
    """Return for each maker the seconds that the first call of what it makes takes, one entry a round.

    The subjects made last are returned as well, so that nothing needs to be compiled once more.
    """
    times: list[list[float]] = [[] for _ in makers]
    subjects = list(makers)
    for order in turns(makers, rounds):
        for i, make in order:
            subjects[i] = make()
            with no_gc():
                times[i].append(timed(subjects[i]))
    return times, subjects


def ratios(ours: list[float], pure: list[float]) -> tuple[float, float]:
    """Return the median of the ratios within a round, and the ratio of the fastest rounds."""
    return statistics.median(a / b for a, b in zip(ours, pure, strict=True)), min(ours) / min(pure)


def duration(seconds: float) -> str:
    """Write a duration with three digits and its unit."""
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= s or u == "µs")
    return f"{seconds / scale:#.3g}".removesuffix(".") + f" {unit}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table with aligned columns; all but the first are flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells):
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def machine(*packages: tuple[str, str]) -> str:
    """Say where and when the figures were taken."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    versions = [("Python", platform.python_version()), ("jax", jax.__version__), ("numpy", np.__version__)]
    return ", ".join(
        [
            f"{date.today()}: {model[1] if model else platform.processor() or platform.machine()}",
            f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f} at the end)",
            *(f"{name} {version}" for name, version in (*versions, *packages)),
        ]
    )


def publish(title: str, text: str) -> None:
    """Print ``text`` and put it into RESULTS.md under ``title``, in place of what stood there."""
    print(f"\n{text}\n\nWritten to {RESULTS}")
    page = RESULTS.read_text() if RESULTS.exists() else "# What a step costs\n"
    head, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    kept = {section.splitlines()[0]: section for section in sections}
    kept[f"## {title}"] = f"## {title}\n\n{text}\n"
    parts = [head, *(kept[key] for key in sorted(kept))]
    RESULTS.write_text("\n\n".join(part.strip() for part in parts) + "\n")
