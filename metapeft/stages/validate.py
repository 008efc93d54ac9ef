"""validate: checks the task before any computing is spent on it.

Writes report.json and report.html. Bad data ends here with one line; what is merely doubtful is said, and goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metapeft.settings import Settings
from metapeft.stages.files import read_task
from metapeft.stages.stage import Stage, write_json, write_text


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Check columns, lengths, labels, duplicates and leakage."""
    from metapeft.data.validation import validate

    report = validate(read_task(work / "version"))
    report.raise_on_error()
    write_json(out / "report.json", report.to_json())
    write_text(out / "report.html", report.to_html())
    return report.summary()


STAGE = Stage(
    "validate",
    body,
    settings=(),
    needs=("version",),
    code=("metapeft/data/validation.py", "metapeft/stages/files.py", "metapeft/stages/validate.py"),
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
