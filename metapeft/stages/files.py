"""What stages hand to each other: the task, written by `version` and read by all others, trials, and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metapeft.data.task import SPLITS, Example, Task
from metapeft.errors import UserError
from metapeft.files import finite
from metapeft.settings import Settings, brief, home
from metapeft.stages.stage import backbone_identity, read_json, write_json, write_text
from metapeft.training.trial import Trial

# Columns of curves.
CURVE = ["trial", "method", "step", "seconds", "train_loss", "validation_loss", "validation_score"]


def write_task(task: Task, folder: Path) -> None:
    """`task.json` (everything but the rows) and `data.jsonl` (one row per example: split, prompt, completion)."""
    rows = [
        json.dumps({"split": split, "prompt": example.prompt, "completion": example.completion}, ensure_ascii=False)
        for split in SPLITS
        for example in task.split(split)
    ]
    write_text(folder / "data.jsonl", "".join(row + "\n" for row in rows))
    write_json(folder / "task.json", {k: v for k, v in asdict(task).items() if k not in SPLITS})


def folders_of(task_version: str) -> Iterator[Path]:
    """Folders of stage outputs in METAPEFT_HOME, of commands, of the server and of Airflow, about a task's rows as they
    were in this version."""
    for place in (home() / "work", home() / "airflow"):
        for facts in sorted(place.rglob("version/task.json")):
            try:
                if read_json(facts)["version"] == task_version:
                    yield facts.parents[1]
            except (UserError, KeyError, TypeError):
                continue  # half removed by somebody


def read_task(folder: Path) -> Task:
    """The task that `write_task` wrote. Raises UserError when it is missing or broken."""
    facts: dict[str, Any] = read_json(folder / "task.json")
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    try:
        for line in (folder / "data.jsonl").read_text(encoding="utf-8").split("\n"):
            if line:
                row = json.loads(line)
                prompt = row["prompt"]
                if isinstance(prompt, list):
                    prompt = tuple((role, content) for role, content in prompt)
                splits[row["split"]].append(Example(prompt, row["completion"]))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (facts | splits).items()}
        return Task(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} does not hold a task ({brief(error)}); run the version stage again") from error


def current_sweep(settings: Settings, work: Path) -> dict[str, Any] | None:
    """The sweep's record, where there is one of this very data and backbone."""
    if not (work / "sweep" / "sweep.json").exists():
        return None
    record: dict[str, Any] = read_json(work / "sweep" / "sweep.json")
    facts = read_json(work / "version" / "task.json")
    wanted = facts["version"], backbone_identity(settings)
    return record if (record["task_version"], record["backbone"]) == wanted else None


def write_trials(trials: list[Trial], path: Path) -> None:
    """One JSON record per line; what is not a number (the loss of a diverged trial) becomes null."""
    records = [finite(trial.to_json()) for trial in trials]
    write_text(path, "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records))


def read_trials(path: Path) -> list[Trial]:
    """Raises UserError when the file is missing or broken."""
    try:
        return [Trial.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not hold trials ({brief(error)}); run the stage that writes it again") from error


def write_csv(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """A table for `dvc plots` (RFC 4180); None becomes an empty cell."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
