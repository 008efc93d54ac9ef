"""How long work speaks to people: a bar on a terminal, a line now and then in a log. Always on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 20.0  # in a log: how long to stay silent at most

Advance = Callable[..., None]


def quiet() -> None:
    """Keep the libraries' chatter off stderr: what they have to say to people comes as our own lines."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def say(line: str) -> None:
    """One line, written at once: `print` writes the end of a line by itself, and lines of two threads would mix."""
    if sys.stderr is not None:  # it may be closed
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextmanager
def progress(label: str, total: float) -> Iterator[Advance]:
    """Gives `advance(done, note="", line=False)`, `done` out of `total`; `line` leaves the note behind as a line."""
    if sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total)


@contextmanager
def _bar(label: str, total: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console, transient=True
    ) as bar:
        job = bar.add_task(label, total=total, note="")

        def advance(done: float, note: str = "", line: bool = False) -> None:
            bar.update(job, completed=done, note=note)
            if line:
                console.print(f"{label}: {note}", highlight=False, markup=False)

        yield advance


def _lines(label: str, total: float) -> Advance:
    spoke = time.monotonic()

    def advance(done: float, note: str = "", line: bool = False) -> None:
        nonlocal spoke
        now = time.monotonic()
        if line or now - spoke > LINE_SECONDS:
            spoke = now
            say(f"{label}: {note}" if line else f"{label}: {100 * done / total:.0f} % {note}".rstrip())

    return advance
