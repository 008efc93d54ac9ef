"""report: one HTML page and pictures of the tuning: learning curves, trade-offs, what was chosen and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metapeft.settings import Settings
from metapeft.stages.files import current_sweep, read_task, read_trials
from metapeft.stages.stage import Stage, read_json
from metapeft.training.trial import Trial


def body(settings: Settings, work: Path, out: Path) -> dict[str, Any]:
    """Draw and write the report."""
    from metapeft.report import Content, write_report

    final = Trial.from_json(read_json(work / "evaluate" / "trial.json"))
    model = read_json(work / "register" / "model.json")
    sweep = current_sweep(settings, work)
    switching = work / "train" / "switching.json"
    content = Content(
        task=read_task(work / "version"),
        trials=read_trials(work / "sweep" / "trials.jsonl") if sweep else (),
        infeasible=sweep["infeasible"] if sweep else {},
        adapters=sweep["adapters"] if sweep else False,
        final=final,
        recommendation=read_json(work / "recommend" / "recommendation.json"),
        profile=read_json(work / "profile" / "profile.json"),
        validation=read_json(work / "validate" / "report.json"),
        environment={"device": final.device, **final.versions},
        called=settings.task,
        switching=read_json(switching) if switching.exists() else None,
        model=f"{model['model']} version {model['version']}",
        examples=read_json(work / "evaluate" / "examples.json"),
    )
    paths = write_report(out, content)
    return {"html": paths.html.name}


STAGE = Stage(
    "report",
    body,
    settings=("task", "backbone"),
    needs=("version", "validate", "profile", "recommend", "train", "evaluate", "register"),
    uses=("sweep",),
    code=("metapeft/report", "metapeft/stages/files.py", "metapeft/stages/report.py"),
)
run, main = STAGE.run, STAGE.main

if __name__ == "__main__":
    raise SystemExit(main())
