"""evaluate: scores the saved adapter and the untuned backbone on the test split.

The adapter is read back from its files, so the score is that of what will be served. Writes trial.json (complete now),
metrics.json for `dvc metrics`, predictions.jsonl, confusion.csv (empty where there are no labels) and examples.json,
which the report shows.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.progress import say
from metapeft.settings import Settings
from metapeft.stages.adapter import read_adapter
from metapeft.stages.files import read_task, write_csv
from metapeft.stages.stage import Stage, read_json, write_json, write_text
from metapeft.stages.trainer import Trainer
from metapeft.training.engine import SOURCES
from metapeft.training.trial import Score, Trial

if TYPE_CHECKING:
    from metapeft.data.task import Task
    from metapeft.training.evaluation import Predictions


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Score the adapter and the untuned backbone."""
    from metapeft.peft import adapters
    from metapeft.stages.examples import examples
    from metapeft.training.evaluation import predict, score

    task = read_task(work / "version")
    trial = Trial.from_json(read_json(work / "train" / "trial.json"))
    saved = read_adapter(work, trial)
    trainer = Trainer(settings.backbone, task)
    session = trainer.session()
    say(f"evaluate: untuned and {trial.method} on {len(task.test)} test examples")
    before = trainer.untuned()
    adapter = adapters.build(saved, session.model, str(work / "train" / "adapter"))
    adapter.attach(session.model)
    try:
        predictions = predict(session, adapter, "test")
    finally:
        adapter.detach(session.model)
    after = score(session, predictions, "test")
    trial.score, trial.untuned_score = after, before
    write_json(out / "trial.json", trial.to_json())
    write_json(out / "metrics.json", metrics(trial, before, after))
    write_predictions(task, predictions, out)
    write_json(out / "examples.json", examples(session, adapter, predictions))
    return {
        "metric": after.metric,
        "score": after.value,
        "standard_error": after.standard_error,
        "untuned": before.value,
    }


def metrics(trial: Trial, before: Score, after: Score) -> dict[str, Any]:
    """Nested numbers, as `dvc metrics show` prints them."""
    keep = ("value", "standard_error", "n", "loss")
    numbers = {
        name: {k: v for k, v in asdict(s).items() if k in keep} for name, s in (("tuned", after), ("untuned", before))
    }
    cost = {
        "train_seconds": trial.train_seconds,
        "peak_memory_mb": trial.peak_memory_mb,
        "adapter_bytes": trial.adapter_bytes,
    }
    return {**numbers, "gain": after.value - before.value, "cost": cost}


def write_predictions(task: Task, predictions: Predictions, out: Path) -> None:
    """One line per test example; the chosen label where there are labels."""
    rows: list[dict[str, Any]] = []
    for index, example in enumerate(task.test):
        loss = float(predictions.loss_sum[index] / max(1.0, predictions.tokens[index]))
        row = {
            "row": index,
            "expected": example.completion.strip(),
            "exact": bool(predictions.exact[index]),
            "loss": loss,
        }
        if predictions.label_scores is not None:
            row["predicted"] = task.labels[int(predictions.label_scores[index].argmax())]
        rows.append(row)
    write_text(out / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    labelled = rows if predictions.label_scores is not None else []
    write_csv(out / "confusion.csv", labelled, ["expected", "predicted"])


STAGE = Stage(
    "evaluate",
    body,
    settings=("backbone",),
    needs=("version", "train"),
    code=(
        *SOURCES,
        "metapeft/data/templates.py",
        "metapeft/stages/adapter.py",
        "metapeft/stages/evaluate.py",
        "metapeft/stages/examples.py",
        "metapeft/stages/files.py",
        "metapeft/stages/trainer.py",
    ),
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
