"""The faults' shared process, one finished pipeline, and the figures that docs/reliability.md quotes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.pipeline import Pipeline
from tests.faults.zygote import Zygote

FIGURES: list[str] = []


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="session")
def pipeline(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A pipeline that ran once, without faults. Every test restores it first."""
    made = Pipeline(tmp_path_factory.mktemp("faults"), zygote)
    made.prepare()
    return made


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> object:
    """Called with a line for the summary at the end."""
    return lambda line: FIGURES.append(f"{Path(request.node.fspath).stem}: {line}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.line(line)
