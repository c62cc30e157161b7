"""Progress of long work: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_SECONDS = 10.0


class ProgressBar:
    """Counts units of work towards ``total`` and shows rate and ETA; made by `progress_bar`."""

    def __init__(self, bar: Progress | None, description: str, total: int, unit: str, initial: int) -> None:
        self._bar, self._description, self._total, self._unit = bar, description, total, unit
        self._done = self._first = initial
        self._started = self._last_line = time.monotonic()
        self._task = bar.add_task(description, total=total, completed=initial, notes="") if bar else None

    def advance(self, amount: int = 1, notes: str = "") -> None:
        """Add ``amount`` finished units; ``notes`` (losses, say) is shown behind the rate."""
        self._done += amount
        now = time.monotonic()
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        text = f"{rate:,.1f} {self._unit}/s  {notes}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=amount, notes=text)
        elif now - self._last_line > LINE_INTERVAL_SECONDS or self._done == self._total:
            self._last_line = now
            eta = (self._total - self._done) / max(rate, 1e-9)
            print(
                f"{self._description}: {self._done:,}/{self._total:,} {self._unit}"
                f"  ETA {int(eta) // 60}:{int(eta) % 60:02d}  {text}",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def progress_bar(
    description: str, total: int, unit: str, *, initial: int = 0, enabled: bool = True
) -> Iterator[ProgressBar]:
    """Show progress on stderr; ``enabled=False`` (every rank but the first) shows nothing.

    ``initial`` is what an earlier run had finished: it counts as done, but not for the rate.
    """
    console = Console(stderr=True, quiet=not enabled)
    if not enabled:
        yield _SilentBar(None, description, total, unit, initial)
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        )
        times = (
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[notes]}"),
        )
        with Progress(*columns, *times, console=console) as bar:
            yield ProgressBar(bar, description, total, unit, initial)
    else:
        yield ProgressBar(None, description, total, unit, initial)


class _SilentBar(ProgressBar):
    def advance(self, amount: int = 1, notes: str = "") -> None:
        pass
