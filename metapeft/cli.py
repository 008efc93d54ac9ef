"""The command line: thin, one function per command. Results on stdout, progress and mistakes on stderr.

Exit codes: 0 success, 2 bad input (one line: what, where, how to fix), 1 any other failure. Heavy imports happen inside
the commands, so that `metapeft --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from metapeft.errors import UserError
from metapeft.fewshot import STRATEGIES

if TYPE_CHECKING:
    from metapeft.training.trial import Score, Trial

MLFLOW = "mlflow"  # in the place of a file: the tracking store of the settings
DEGRADED = 3  # of `metapeft monitor --exit-code`: there is an alert
LISTED = 10  # rows of a recommendation; --json has all
INTERRUPTED = 130  # what typer makes of Ctrl-C: 128 + SIGINT

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Decide how to fine-tune, then do it.",
    epilog="Any command takes --debug, to show the traceback of a failure.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def group(name: str, help: str) -> typer.Typer:
    part = typer.Typer(help=help)
    app.add_typer(part, name=name)
    return part


tasks = group("tasks", "The catalog of public tasks.")
experience = group("experience", "All trials that are known: run here, imported, or shipped.")
meta = group("meta", "The model that recommends: fitted to the experience, judged on tasks never seen.")
models = group("models", "The registry of adapters.")
adapters = group("adapters", "The library of adapters, and adapter folders.")
keys = group("keys", "Who may use the server.")

Task = Annotated[str, Argument(help="A file (.jsonl, .csv, .parquet), a Hugging Face dataset id, or a catalog name.")]
Json = Annotated[bool, Option("--json", help="Print JSON for machines.")]
Backbone = Annotated[str | None, Option(help="Base model: packaged name, hub id, or folder.")]
Seed = Annotated[int | None, Option(min=0, help="Of data order and initialisation.")]
Params = Annotated[Path | None, Option(help="Settings file (default: params.yaml where there is one).")]
Work = Annotated[Path | None, Option(help="Folder of the stages' outputs (default: one per task in METAPEFT_HOME).")]
Sampler = Literal["tpe", "gp", "nsga2", "random"]
Prefer = Literal["accuracy", "balanced", "speed", "memory"]


def tell_version(wanted: bool) -> None:
    if wanted:
        import metapeft

        print(f"metapeft {metapeft.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=tell_version, help="Print the version.")
    ] = False,
) -> None:
    """What holds for all commands."""


@tasks.command("list")
def tasks_list(as_json: Json = False) -> None:
    """All tasks of the catalog."""
    from metapeft.data import catalog

    entries = [described(entry) for entry in catalog.entries()]
    columns = ("name", "kind", "family", "rows", "labels", "megabytes", "licence")
    show(entries, as_json, [{key: entry[key] for key in columns} for entry in entries])


@tasks.command("show")
def tasks_show(name: Annotated[str, Argument(help="Catalog name.")], as_json: Json = False) -> None:
    """Everything about one task of the catalog."""
    from metapeft.data import catalog

    show(described(catalog.get(name)), as_json)


@tasks.command("fetch")
def tasks_fetch(names: Annotated[list[str], Argument(help="Catalog names.")], as_json: Json = False) -> None:
    """Download tasks and check their hashes."""
    from metapeft.data import catalog

    show([{"name": name, "path": str(catalog.fetch(name))} for name in names], as_json)


@tasks.command("version")
def tasks_version(
    files: Annotated[list[Path], Argument(help="Task files or folders in a DVC repository.")], as_json: Json = False
) -> None:
    """Check task files and put them under DVC, with a copy in its remote."""
    from metapeft.data import incoming

    found = [incoming.version(file).to_json() for file in files]
    columns = ("file", "rows", "version", "dvc_id", "changed")
    rows = [{key: entry[key] for key in columns} for entry in found]
    show(found if len(found) > 1 else found[0], as_json, rows)


@app.command()
def profile(
    task: Task,
    backbone: Backbone = None,
    seed: Seed = None,
    params: Params = None,
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Measure what characterises a task."""
    from metapeft import api

    found = api.profile(task, backbone=backbone, seed=seed, params=params, work=work).to_json()
    rows = [{"feature": name, "value": value} for name, value in found["features"].items()]
    show(found, as_json, rows, title=f"Profile of {task}")


@app.command()
def recommend(
    task: Task,
    prefer: Annotated[Prefer | None, Option(help="What weighs most.")] = None,
    max_seconds: Annotated[float | None, Option(help="Longest training.")] = None,
    max_memory_mb: Annotated[float | None, Option(help="Highest peak memory.")] = None,
    backbone: Backbone = None,
    seed: Seed = None,
    params: Params = None,
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Rank methods and configurations for a task."""
    from metapeft import api

    options: dict[str, Any] = {"backbone": backbone, "seed": seed, "params": params, "work": work}
    found = api.recommend(
        task, prefer=prefer, max_seconds=max_seconds, max_memory_mb=max_memory_mb, **options
    ).to_json()
    listed, untuned = found["recommendations"], found["untuned"]
    about = f"basis: {found['basis']}; {found['steps']} steps; untuned: {untuned['score']:.3f}"
    show(found, as_json, recommended(found)[:LISTED], title=f"Recommended for {found['task']} ({about})")
    if not as_json:
        if len(listed) > LISTED:
            print(f"… and {len(listed) - LISTED} more (--json)")
        if found["prefer"] != "accuracy":
            print(f"ranked by expected score less what seconds and memory cost (--prefer {found['prefer']})")
        print(found["advice"])
        if len(found["together"]) > 1:
            ranks = ", ".join(map(str, found["together"]))
            print(f"to try several, take ranks {ranks}: where one does badly, another does well")
        for near in found["neighbours"]:
            best = near["best"]
            where = f"{near['task']} with {near['examples']} examples ({near['similarity']:.2f})"
            print(f"like {where}: there {best['method']} reached {best['score']:.3f}")


@app.command()
def train(
    task: Task,
    method: Annotated[str | None, Option(help="Default: the best of the sweep, else the first recommended.")] = None,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="A hyperparameter, e.g. learning_rate=0.003.")
    ] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps.")] = None,
    switch: Annotated[
        bool | None, Option("--switch", help="The method may be exchanged on the way, within the same seconds.")
    ] = None,
    backbone: Backbone = None,
    seed: Seed = None,
    params: Params = None,
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Train one adapter, score it, register it and leave a page about it."""
    from metapeft import api
    from metapeft.stages.stage import assignments

    options: dict[str, Any] = {"backbone": backbone, "seed": seed, "params": params, "work": work}
    given = assignments(set_ or [])
    page = api.report_of(task, **options)
    trial = api.train(task, method=method, configuration=given or None, steps=steps, switch=switch, **options)
    show(trial.to_json(), as_json, outcome(trial), title=f"{trial.method} on {trial.task}")
    if not as_json:
        print(f"adapter: {trial.adapter}\nreport:  {page}")


@app.command(name="train-sequence")
def train_sequence(
    names: Annotated[list[str], Argument(help="Tasks, in their order: files, dataset ids or catalog names.")],
    keep: Annotated[
        Literal["adapters", "replay", "ewc", "l2", "naive"], Option(help="How earlier tasks are kept.")
    ] = "adapters",
    buffer: Annotated[int, Option(min=1, help="Examples of each earlier task that are replayed.")] = 32,
    strength: Annotated[float | None, Option(min=0, help="Of the penalty of ewc and l2.")] = None,
    method: Annotated[str | None, Option(help="The method of all tasks (default: lora).")] = None,
    set_: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="A hyperparameter, e.g. learning_rate=0.003.")
    ] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps per task.")] = None,
    backbone: Backbone = None,
    seed: Seed = None,
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Train tasks one after another, and measure what is left of the earlier ones."""
    from metapeft import api
    from metapeft.stages.stage import assignments

    given = assignments(set_ or [])
    options: dict[str, Any] = {"backbone": backbone, "seed": seed, "params": params}
    found = api.train_sequence(
        names,
        keep=keep,
        buffer=buffer,
        strength=strength,
        method=method,
        configuration=given,
        steps=steps,
        **options,
    ).to_json()
    last, learned = found["scores"][-1], [row[-1] for row in found["scores"]]
    rows = [
        {
            "task": name,
            "untuned": number(found["untuned"][n]),
            "when learned": number(learned[n]),
            "at the end": number(last[n]),
            "adapter": found["adapters"][n],
        }
        for n, name in enumerate(found["tasks"])
    ]
    show(found, as_json, rows, title=f"{len(rows)} tasks, kept by {keep}")
    if not as_json:
        measures = ("average_accuracy", "backward_transfer", "forgetting", "drift")
        print(", ".join(f"{name.replace('_', ' ')} {found[name]:.3f}" for name in measures))
        for each in found["models"]:
            print("model: {model} version {version}, {alias} ({reason})".format(**each))


@app.command()
def adapt(
    task: Task,
    shots: Annotated[int | None, Option(min=1, help="How many examples (default: every row of a file).")] = None,
    max_seconds: Annotated[float | None, Option(help="For trying strategies.")] = None,
    strategy: Annotated[
        list[str] | None, Option(help=f"Try only this one (may be repeated): {', '.join(STRATEGIES)}.")
    ] = None,
    backbone: Backbone = None,
    seed: Seed = None,
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Learn a task from a few examples, starting from what other tasks have taught; registers the adapter."""
    from metapeft import api

    options: dict[str, Any] = {"backbone": backbone, "seed": seed, "params": params}
    found = api.adapt(task, shots=shots, max_seconds=max_seconds, strategies=strategy or (), **options)
    rows = [
        {
            "strategy": each.strategy,
            "steps": each.steps,
            "on held-out shots": plus_minus(each.difference, each.standard_error) if each.measured else "not measured",
            "expected gain": plus_minus(each.gain, each.deviation),
            "P(gains)": number(each.p_better),
            "seconds": number(each.seconds, 1),
            "from": each.origin,
        }
        for each in found.judged
    ]
    show(found.to_json(), as_json, rows, title=f"{found.task}, {found.shots} shots, beside the untuned backbone")
    if as_json:
        return
    print(found.why)
    if found.skipped:
        why = "no time for" if found.late else "not tried, as nothing better is expected of them"
        why = why if found.shots > 1 else "not tried, as one shot cannot be held out"
        print(f"{why}: {', '.join(found.skipped)}")
    if found.untuned_score and found.score:
        print(f"test split: {score_text(found.score)}, untuned {score_text(found.untuned_score)}")
    elif found.trial and found.trial.validation:
        less = f" (less {found.optimism:.3f}, what choosing by them adds)" if found.optimism else ""
        print(f"held-out shots: {score_text(found.trial.validation)}{less}")
    print(f"{found.seconds:.0f} seconds; " + (f"adapter: {found.adapter}" if found.adapter else "no adapter is needed"))
    if "model" in found.registered:
        print("model:   {model} version {version}, {alias} ({reason})".format(**found.registered))
    elif found.adapter:
        print("not registered: nothing has measured it")


@app.command()
def sweep(
    task: Task,
    trials: Annotated[int | None, Option(help="How many trials.")] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps of one trial.")] = None,
    max_seconds: Annotated[float | None, Option(help="Time for all trials together.")] = None,
    max_trial_seconds: Annotated[float | None, Option(help="Longest training: a constraint on every trial.")] = None,
    max_memory_mb: Annotated[float | None, Option(help="Highest peak memory: a constraint on every trial.")] = None,
    workers: Annotated[int | None, Option(help="Processes that train at the same time.")] = None,
    method: Annotated[list[str] | None, Option(help="Search only this method (may be repeated).")] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Fix a hyperparameter, or give choices: rank=[4,8]."),
    ] = None,
    space: Annotated[Path | None, Option(help="YAML or JSON file that fixes or narrows hyperparameters.")] = None,
    cold: Annotated[bool, Option("--cold", help="Start without what other tasks have taught.")] = False,
    full_budget: Annotated[bool, Option("--full-budget", help="Never end a hopeless trial early.")] = False,
    repeats: Annotated[int | None, Option(help="Of the trials, how many repeat the best with other seeds.")] = None,
    sampler: Annotated[Sampler | None, Option(help="What proposes configurations (default: tpe).")] = None,
    small_adapters: Annotated[bool, Option("--small-adapters", help="The adapter's size is an objective too.")] = False,
    backbone: Backbone = None,
    seed: Seed = None,
    params: Params = None,
    work: Work = None,
    as_json: Json = False,
) -> None:
    """Search configurations; show the Pareto front."""
    from metapeft import api
    from metapeft.search import pareto
    from metapeft.search.spaces import read
    from metapeft.stages.stage import assignments

    found = api.sweep(
        task,
        trials=trials,
        steps=steps,
        max_seconds=max_seconds,
        max_trial_seconds=max_trial_seconds,
        max_memory_mb=max_memory_mb,
        workers=workers,
        methods=method,
        space=((read(space) if space else {}) | assignments(set_ or [])) or None,
        warm=False if cold else None,
        stop=False if full_budget else None,
        repeats=repeats,
        sampler=sampler,
        adapters=True if small_adapters else None,
        backbone=backbone,
        seed=seed,
        params=params,
        work=work,
    )
    rows = pareto.explain(found.feasible(), task, found.adapters)
    if as_json:
        return show(found.to_json() | {"rows": [row.to_json() for row in rows], "report": str(found.report)}, True)
    from metapeft.report import tables

    title = f"Pareto front of {len(found.trials)} trials on {found.task}"
    printed(tables.front(rows, title) if rows else "no trial ended well: see the report")
    for line in (*tables.order(rows), *tables.mattered(found.trials)):
        print(line)
    print(f"\n{tables.commands(rows)}\n\nreport: {found.report}")


@experience.command("list")
def experience_list(as_json: Json = False) -> None:
    """All trials, those that ship among them."""
    from metapeft.meta.experience import Experience

    trials = Experience().trials()
    rows = [
        {
            "trial": trial.id,
            "task": trial.task,
            "method": trial.method,
            "status": trial.status,
            "score": score_text(trial.score),
            "untuned": score_text(trial.untuned_score),
            "seconds": f"{trial.seconds:.1f}",
            "steps": trial.budget,
            "started": trial.started,
        }
        for trial in trials
    ]
    show([trial.to_json() for trial in trials], as_json, rows, title=f"{len(trials)} trials")


@experience.command("grow")
def experience_grow(
    tasks: Annotated[list[str] | None, Option("--tasks", help="Only this task (may be repeated).")] = None,
    max_seconds: Annotated[float | None, Option(help="Time for all trials together.")] = None,
    trials: Annotated[int | None, Option(min=1, help="How many trials at most.")] = None,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Run the trials that teach most, a fixed set of configurations on every task of the catalog. May be interrupted,
    repeated, and run several times at once. The first time it fetches the catalog's packages and the backbone (together
    about 0.5 GB); with --tasks only those of the tasks."""
    from metapeft import api

    found = api.grow(tasks, backbone=backbone, max_seconds=max_seconds, max_trials=trials)
    rows = [
        {
            "trials": found.trials,
            **found.statuses,
            "tasks": len(found.tasks),
            "minutes": f"{found.seconds / 60:.1f}",
            "of the plan": f"{found.known + found.trials} of {found.cells}",
            "left (hours)": f"{found.predicted_seconds / 3600:.1f}",
        }
    ]
    show(found.to_json(), as_json, rows)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)


@experience.command("export")
def experience_export(
    to: Annotated[str, Argument(help="A .parquet or .jsonl file, or `mlflow`: the tracking store.")],
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Write your own trials to a file, or to MLflow those that it does not hold."""
    from metapeft.meta.experience import Experience

    if to == MLFLOW:
        from metapeft.tracking import exchange

        written = exchange.publish(settings(params), Experience(shipped=None).trials())
    else:
        written = Experience().export(Path(to))
    show({"trials": written, "to": to}, as_json)


@experience.command("import")
def experience_import(
    source: Annotated[str, Argument(help="A file that export wrote, or `mlflow`: the tracking store.")],
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Add the trials of a file, or of MLflow, that are not known here."""
    from metapeft.meta.experience import Experience

    if source == MLFLOW:
        from metapeft.tracking import exchange

        added = Experience().add(exchange.collect(settings(params)))
    else:
        added = Experience().merge(Path(source))
    show({"trials": added, "from": source}, as_json)


@experience.command("version")
def experience_version(
    folder: Annotated[Path, Option(help="A folder in the project, under DVC.")] = Path("knowledge"),
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Put the experience and the meta-model under DVC, and the meta-model into the registry."""
    from metapeft.tracking import knowledge

    show(knowledge.snapshot(settings(params), folder).to_json(), as_json)


@experience.command("restore")
def experience_restore(
    folder: Annotated[Path, Option(help="The folder of `experience version`.")] = Path("knowledge"),
    version: Annotated[str | None, Option(help="A snapshot's content id (default: what FOLDER.dvc says).")] = None,
    as_json: Json = False,
) -> None:
    """Take over a snapshot's trials, and its meta-models where there are none."""
    from metapeft.tracking import knowledge

    show(knowledge.restore(folder, version), as_json)


@meta.command("train")
def meta_train(as_json: Json = False) -> None:
    """Fit the meta-model anew; it replaces the champion unless it does worse on tasks left out."""
    from metapeft.meta import versions
    from metapeft.meta.knowledge import knowledge
    from metapeft.meta.unfinished import learn

    known = knowledge()
    remaining = learn(known.trials)
    found = versions.train(known.observations(remaining), remaining)
    row = {"version": found.version, "promoted": "yes" if found.promoted else "no", "why": found.reason}
    show(found.to_json(), as_json, [row | {"tasks": found.tasks, "observations": found.observations}])


@meta.command("starts")
def meta_starts(
    tasks: Annotated[list[str] | None, Option("--tasks", help="Only this task (may be repeated).")] = None,
    method: Annotated[list[str] | None, Option(help="Only this method: lora or prefix (may be repeated).")] = None,
    rounds: Annotated[int, Option(min=1, help="Of Reptile, each a few steps on one task.")] = 200,
    max_seconds: Annotated[float | None, Option(help="Time for all methods together.")] = None,
    backbone: Backbone = None,
    seed: Seed = None,
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Meta-learn what `adapt` may start from, on the library's tasks. May be interrupted and repeated."""
    from metapeft import api

    options: dict[str, Any] = {"backbone": backbone, "seed": seed, "params": params}
    done = api.learn_starts(tasks, methods=method or (), rounds=rounds, max_seconds=max_seconds, **options)
    show(done, as_json, [{"method": name, "rounds": count} for name, count in done.items()])


@meta.command("evaluate")
def meta_evaluate(
    output: Annotated[Path | None, Option(help="Folder of table and pictures (default: in METAPEFT_HOME).")] = None,
    curve: Annotated[bool, Option(help="Also with few known tasks.")] = True,
    as_json: Json = False,
) -> None:
    """Leave every family of tasks out, recommend for it, and compare with what was measured there."""
    from metapeft.meta import versions
    from metapeft.meta.evaluate import evaluate
    from metapeft.meta.knowledge import knowledge
    from metapeft.report import evaluation
    from metapeft.settings import home

    known = knowledge()
    observations = known.observations(versions.champion().model.remaining)
    found = evaluate(observations, len(known.trials), curve)
    tasks = list(dict.fromkeys(o.task for o in observations))
    written = evaluation.write(found, versions.champion().model, tasks, output or home() / "meta" / "evaluation")
    record = {**found.to_json(), "folder": str(written.folder), "files": list(written.files)}
    show(
        record,
        as_json,
        evaluation.rows_of_selectors(found),
        title=f"{len({j.task for j in found.tasks})} tasks, each family left out",
    )
    if not as_json:
        show(None, False, evaluation.rows_of_targets(found))
        print(f"table and pictures: {written.folder}")


@meta.command("versions")
def meta_versions(as_json: Json = False) -> None:
    """All versions of the meta-model."""
    from metapeft.meta import versions

    now = versions.champion().number
    found = [{**v.to_json(), "champion": v.number == now} for v in versions.versions()]
    names = ("number", "made", "tasks", "observations", "champion")
    show(found, as_json, [{name: v[name] for name in names} for v in found])


@meta.command("promote")
def meta_promote(
    version: Annotated[int, Argument(min=0, help="Version that becomes champion (0: the shipped one).")],
    as_json: Json = False,
) -> None:
    """Make a version the champion."""
    from metapeft.meta import versions

    show({"champion": versions.promote(version).number}, as_json)


@meta.command("rollback")
def meta_rollback(as_json: Json = False) -> None:
    """Give the champion's place back to the version before."""
    from metapeft.meta import versions

    show({"champion": versions.rollback().number}, as_json)


@app.command()
def compare(
    runs: Annotated[
        list[str] | None, Argument(help="Run ids, run names or experiments (default: the experiment).")
    ] = None,
    by: Annotated[
        Literal["trial", "sweep", "strategy", "method", "experiment", "selection"], Option(help="What one row is.")
    ] = "trial",
    plot: Annotated[Path | None, Option(help="Also draw it: a .png or .svg file (only --by selection).")] = None,
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Put recorded runs side by side. `--by selection`: which way to choose a configuration is better, and how sure."""
    if plot is not None and by != "selection":
        raise UserError("--plot draws selection strategies; add --by selection")
    if by == "selection":
        from metapeft.tracking.selections import selections

        compared = selections(settings(params), runs or ())
        if plot is not None:
            from metapeft.report.selections import draw

            draw(compared, plot)
        if as_json:
            return show(compared.to_json(), True)
        show(None, False, [told(asdict(row)) for row in compared.strategies], title="How configurations were chosen")
        if compared.pairs:
            show(None, False, [told(asdict(row)) for row in compared.pairs], title="On the same tasks")
        return
    if by != "trial":
        from metapeft.search.compare import compare_by

        rows = compare_by(settings(params), by, runs or ())
        table = [
            {
                by: row[by],
                "task": row["task"],
                "trials": row["trials"],
                "best": row["best"],
                "validation": plus_minus(row["score"], row["score_standard_error"]),
                "test": number(row["test"]),
                "untuned": number(row["untuned"]),
                "hypervolume": number(row["hypervolume"]),
                "seconds": number(row["seconds"], 0),
            }
            for row in rows
        ]
        return show(rows, as_json, table)
    from metapeft.tracking.compare import compare as rows_of

    rows = rows_of(settings(params), runs or ())
    table = [
        {
            "run": row["name"],
            "task": row["task"],
            "backbone": Path(row["backbone"]).name,
            "method": row["method"],
            "metric": row["metric"],
            "validation": plus_minus(row["validation"], row["validation_standard_error"]),
            "test": plus_minus(row["score"], row["score_standard_error"]),
            "untuned": number(row["untuned_score"]),
            "seconds": number(row["seconds"], 1),
            "memory MB": number(row["peak_memory_mb"], 0),
            "adapter": size(row["adapter_bytes"]),
            "status": row["status"],
        }
        for row in rows
    ]
    show(rows, as_json, table)


@models.command("list")
def models_list(params: Params = None, as_json: Json = False) -> None:
    """All registered adapters."""
    from metapeft.tracking.models import list_models

    found = list_models(settings(params))
    show([model.to_json() for model in found], as_json, [registered(model) for model in found])


@models.command("promote")
def models_promote(
    name: Annotated[str, Argument(help="Registered name, or a task's name.")],
    version: Annotated[int, Argument(help="Version that becomes champion.")],
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Make a version the champion."""
    from metapeft.tracking.models import promote

    model = promote(settings(params), name, version)
    show(model.to_json(), as_json, [registered(model)])


@models.command("rollback")
def models_rollback(
    name: Annotated[str, Argument(help="Registered name, or a task's name.")],
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Give the champion's place back to the version before."""
    from metapeft.tracking.models import rollback

    model = rollback(settings(params), name)
    show(model.to_json(), as_json, [registered(model)])


@models.command("restore")
def models_restore(
    name: Annotated[str, Argument(help="NAME, NAME@ALIAS or NAME@VERSION: a registered name, or a task's.")],
    folder: Annotated[Path, Argument(help="New folder for code, parameters, data and adapter.")],
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Restore what a model was made of: code version, parameters, data."""
    from metapeft.tracking.restore import restore

    show(restore(settings(params), name, folder).to_json(), as_json)


@adapters.command("list")
def adapters_list(
    like: Annotated[str | None, Option(help="A task: those of the tasks nearest to it, the nearest first.")] = None,
    backbone: Backbone = None,
    seed: Seed = None,
    params: Params = None,
    as_json: Json = False,
) -> None:
    """The library: the best adapter of every method on every task that was trained on here."""
    from metapeft.meta import library

    every = library.entries()
    if like is None or not every:  # in an empty library nothing has to be measured
        found: list[dict[str, Any]] = [entry.to_json() for entry in every]
    else:
        from metapeft import api

        profile = api.profile(like, backbone=backbone, seed=seed, params=params)
        near = library.find(profile, count=10, named=profile.task)
        found = [{"similarity": near_by.similarity, **near_by.entry.to_json()} for near_by in near]
    rows = [
        {
            **({"similarity": number(entry["similarity"], 2)} if like is not None else {}),
            "task": entry["task"],
            "examples": entry["train_examples"],
            "method": entry["method"],
            **{name: score_json(entry[name]) for name in ("validation", "score", "untuned")},
            "size": size(entry["bytes"]),
            "licence": entry["licence"],
            "folder": Path(entry["folder"]).relative_to(library.folder()),
        }
        for entry in found
    ]
    show(found, as_json, rows, title=f"{len(found)} adapters in {library.folder()}")


@adapters.command("convert")
def adapters_convert(
    source: Annotated[Path, Argument(help="Folder in metapeft's, Hugging Face PEFT's or mlx-lm's format.")],
    destination: Annotated[Path, Argument(help="Folder to write.")],
    to: Annotated[Literal["metapeft", "peft", "mlx-lm"], Option(help="Format to write.")] = "peft",
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Convert an adapter folder to another format."""
    from metapeft.peft.checkpoints import convert

    saved = convert(source, destination, to, backbone)
    show({"method": saved.config.method, "from": saved.format, "to": to, "folder": str(destination)}, as_json)


@app.command()
def serve(
    host: Annotated[str, Option(help="Address to listen on; one that others reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    backbone: Backbone = None,
    rows: Annotated[int, Option(min=1, help="Sequences written at the same time.")] = 64,
    queue: Annotated[int, Option(min=1, help="Requests that may wait; more get 429.")] = 256,
    adapter_mb: Annotated[float, Option(min=0, help="Adapters kept in memory.")] = 512.0,
    poll_seconds: Annotated[float, Option(min=1, max=86_400, help="How often to look at the registry unasked.")] = 60.0,
    timeout: Annotated[float, Option(min=1, help="Seconds that one request may take.")] = 300.0,
    params: Params = None,
) -> None:
    """Serve the backbone with all registered adapters over HTTP."""
    from metapeft import api
    from metapeft.serving.app import Bounds
    from metapeft.serving.engine import Limits
    from metapeft.serving.server import serve as run

    limits = Limits(rows, queue, adapter_mb)
    chosen = api.settings_for("serve", backbone=backbone, params=params)
    run(chosen, host, port, limits, Bounds(seconds=timeout), poll_seconds, params)


@app.command()
def monitor(
    shadow: Annotated[
        int | None, Option(min=0, help="First train the runner-up beside so many first choices (default: settings).")
    ] = None,
    remeasure: Annotated[
        int | None, Option(min=0, help="Measure so many profiles again, all where one differs (default: settings).")
    ] = None,
    textfile: Annotated[Path | None, Option(help="Also write a .prom file for node_exporter.")] = None,
    dry: Annotated[bool, Option("--dry-run", help="Say nothing to anyone and remember nothing.")] = False,
    quick: Annotated[
        bool, Option("--quick", help="Do not estimate what retraining would gain; measure no profile again.")
    ] = False,
    exit_code: Annotated[bool, Option("--exit-code", help="End with exit code 3 when there is an alert.")] = False,
    retrains: Annotated[
        str, Option(help="Your name, if you retrain where it says so: no one else is told to for the same alert.")
    ] = "",
    params: Params = None,
    as_json: Json = False,
) -> None:
    """Is the advice still as good as promised, and what is served with it? Alerts go where METAPEFT_ALERT_… says."""
    from metapeft import api
    from metapeft.monitoring import wording

    if quick and remeasure is None:
        remeasure = 0
    report = api.monitor(
        shadow=shadow, remeasure=remeasure, tell=not dry, estimate=not quick, retrains=retrains, params=params
    )
    if textfile is not None:
        from metapeft.monitoring import exported

        exported.write(report.to_json(), textfile)
    show(report.to_json(), as_json, wording.rows(report), title=wording.title(report))
    if not as_json:
        for line in wording.lines(report):
            print(line)
    if exit_code and not report.healthy:
        raise typer.Exit(DEGRADED)


@keys.command("create")
def keys_create(
    name: Annotated[str, Argument(help="Whom the key is for.")],
    per_minute: Annotated[int, Option(min=1, help="Requests allowed.")] = 600,
    admin: Annotated[bool, Option("--admin", help="May deploy models.")] = False,
    as_json: Json = False,
) -> None:
    """Make a key and show it, this once."""
    from metapeft.serving import keys as ring

    key, text = ring.create(name, per_minute, admin)
    show({"key": text, **key.described()}, as_json)


@keys.command("list")
def keys_list(as_json: Json = False) -> None:
    """All keys, without their secrets."""
    from metapeft.serving import keys as ring

    show([key.described() for key in ring.load()], as_json)


@keys.command("rotate")
def keys_rotate(
    name: Annotated[str, Argument(help="Name or id of a key.")],
    grace_seconds: Annotated[float, Option(min=0, help="How long the old one stays valid.")] = 3600.0,
    as_json: Json = False,
) -> None:
    """Give a key a new secret."""
    from metapeft.serving import keys as ring

    key, text = ring.rotate(name, grace_seconds)
    show({"key": text, **key.described()}, as_json)


@keys.command("revoke")
def keys_revoke(name: Annotated[str, Argument(help="Name or id of a key.")], as_json: Json = False) -> None:
    """Make a key invalid at once."""
    from metapeft.serving import keys as ring

    show(ring.revoke(name).described(), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Examine this machine and say what to fix."""
    from metapeft.doctor import examine, format

    checks = examine()
    if as_json:
        show([asdict(check) for check in checks], True)
    else:
        print(format(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def demo(task: Annotated[str, Argument(help="A catalog name or a file.")] = "trec6", as_json: Json = False) -> None:
    """The whole job on a real task, with a report."""
    from metapeft import demo as whole_job
    from metapeft.training.trial import Trial

    found = whole_job.run(task)
    if as_json:
        return show(found, True)
    trial = Trial.from_json(found["trial"])
    show(None, False, recommended(found["recommendation"])[:LISTED], title="Recommended before any training")
    tried = [Trial.from_json(record) for record in found["methods"]]
    rows = [
        {
            "rank": rank,
            "method": best.method,
            "validation": score_text(best.validation),
            "test": score_text(best.score),
            "seconds": f"{best.train_seconds:.1f}",
            "memory MB": f"{best.peak_memory_mb:.0f}",
            "adapter": size(best.adapter_bytes),
            "learning rate": f"{best.configuration['learning_rate']:.2g}",
            "ended": "" if best.status == "ok" else best.status,
        }
        for rank, best in enumerate(tried, start=1)
    ]
    show(None, False, rows, title=f"Methods on {trial.task}, ranked by the sweep")
    show(None, False, outcome(trial), title=f"Trained and registered: {trial.method}")
    print(f"adapter: {trial.adapter}\nmodel:   {found['model']}\nreport:  {found['report']}")


def told(row: dict[str, Any]) -> dict[str, Any]:
    """A table row whose fractions have three digits."""
    return {key.replace("_", " "): number(v) if isinstance(v, float) else v for key, v in row.items()}


def described(entry: Any) -> dict[str, Any]:
    """A catalog entry for people: without how its rows are extracted."""
    return {key: value for key, value in asdict(entry).items() if key not in ("extract", "archives")}


def settings(params: Path | None) -> Any:
    """Settings of a command that is about no task."""
    from metapeft.settings import load_settings

    default = Path("params.yaml")
    return load_settings(params or (default if default.exists() else None))


def recommended(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Table rows of a recommendation."""
    return [
        {
            "rank": entry["rank"],
            "method": entry["method"],
            "score": interval(**entry["score"]),
            "P(best)": number(entry["p_best"]),
            "seconds": number(entry["seconds"], 0),
            "memory MB": number(entry["peak_memory_mb"], 0),
            "adapter": size(entry["adapter_bytes"]),
            "configuration": ", ".join(f"{k}={v}" for k, v in entry["configuration"].items() if k != "method"),
        }
        for entry in found["recommendations"]
    ]


def outcome(trial: Trial) -> list[dict[str, Any]]:
    """One table row per score."""
    return [
        {
            "split": "test",
            "metric": trial.score.metric if trial.score else "",
            "tuned": score_text(trial.score),
            "untuned": score_text(trial.untuned_score),
            "train seconds": f"{trial.train_seconds:.1f}",
            "memory MB": f"{trial.peak_memory_mb:.0f}",
            "adapter": size(trial.adapter_bytes),
        }
    ]


def registered(model: Any) -> dict[str, Any]:
    """A table row of a registered adapter."""
    return {
        "model": model.name,
        "version": model.version,
        "alias": ", ".join(model.aliases),
        "method": model.method,
        model.metric or "score": plus_minus(model.score, model.standard_error),
        "untuned": number(model.untuned_score),
        "data": model.task_version,
    }


def score_text(score: Score | None) -> str:
    return plus_minus(score.value, score.standard_error) if score else ""


def score_json(score: dict[str, Any] | None) -> str:
    return plus_minus(score["value"], score["standard_error"]) if score else ""


def interval(mean: float, low: float, high: float, level: float) -> str:
    return f"{number(mean)} [{number(low)}, {number(high)}]"


def plus_minus(value: float | None, error: float | None) -> str:
    return f"{number(value)}{f' ± {number(error)}' if error is not None else ''}" if value is not None else ""


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def size(bytes: float | None) -> str:
    return "" if not bytes else f"{bytes / 1e6:.2f} MB"


def show(value: Any, as_json: bool, rows: list[dict[str, Any]] | None = None, title: str | None = None) -> None:
    """JSON for machines; for people a table of `rows`, or names and values."""
    from metapeft.files import finite

    if as_json:
        print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if rows is None:
        rows = value if isinstance(value, list) else [{"": k, "value": v} for k, v in value.items()]
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    printed(table if rows else "nothing yet")


def printed(what: Any) -> None:
    """A table (or text), as wide as the terminal, or as a log takes."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(what)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    from metapeft.progress import quiet
    from metapeft.stages.stage import end_with_parent, hear_interrupts, report_failure

    hear_interrupts()
    end_with_parent()
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    quiet()
    try:
        code: int = app(words, prog_name="metapeft", standalone_mode=False) or 0
        if code == INTERRUPTED:
            print("error: interrupted", file=sys.stderr)
        return code
    except typer.TyperException as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "metapeft")
        return report_failure(UserError(f"{error.format_message()} (see {where} --help)"), debug)
    except SystemExit:  # typer, when the reader of our output has gone (`metapeft … | head`)
        return 0
    except Exception as error:
        return report_failure(error, debug)


if __name__ == "__main__":
    raise SystemExit(main())
