"""Puts the experience into the package: the table that `metapeft experience grow` made, its tasks' profiles, a
datasheet, and the meta-model that is fitted to them.

    python -m metapeft.meta.ship            # after `metapeft experience grow` in this METAPEFT_HOME, in a checkout
    python -m metapeft.monitoring.promise   # then: what is promised of the model

What ships are trials of public tasks (the catalog's) with the rows of the plan; anything else that was tried here stays
here. What was shipped before stays shipped, unless it was measured again.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from metapeft.meta.evidence import key
from metapeft.meta.experience import SHIPPED, Experience
from metapeft.meta.gains import gain
from metapeft.meta.knowledge import Knowledge
from metapeft.meta.plan import CONFIGURATIONS, configurations
from metapeft.meta.versions import Version
from metapeft.peft import METHODS
from metapeft.profiling import Profile, every_profile
from metapeft.profiling import profiles as profiling
from metapeft.progress import say
from metapeft.settings import DEFAULT_BACKBONE
from metapeft.training.trial import Trial

DOCS = Path(__file__).parents[2] / "docs" / "experience.md"
LAYERS = {DEFAULT_BACKBONE: 30}  # backbones whose experience ships


def ship(store: Experience, table: Path, profiles: Path, docs: Path) -> list[Trial]:
    """Writes the table's file, one file per profile, and the datasheet; returns the trials."""
    rows = {backbone: {key(row) for row in configurations(depth)} for backbone, depth in LAYERS.items()}
    tasks = entries()
    trials = [
        replace(trial, adapter="", error=trial.error.split("\n")[0][:200])
        for trial in store.trials()
        if trial.task in tasks and key(trial.configuration) in rows.get(trial.backbone, ())
    ]
    Experience.write(trials, table)
    shipped = {(trial.task_version, trial.backbone) for trial in trials}
    known = every_profile()
    profiles.mkdir(parents=True, exist_ok=True)
    for place in sorted(shipped & known.keys()):
        name = f"{known[place].task_version}-{known[place].backbone_content[:16]}.json"
        (profiles / name).write_text(compact(known[place]), encoding="utf-8")
    docs.write_text(datasheet(trials, known), encoding="utf-8")
    return trials


def fit_shipped(folder: Path) -> Version:
    """Fits the meta-model to what ships in a folder and nothing else, and writes `model.json` into it."""
    from metapeft.meta.fitting import fit, groups
    from metapeft.meta.unfinished import learn

    known = shipped(folder)
    remaining = learn(known.trials)
    observations = known.observations(remaining)
    found = Version(
        0,
        replace(fit(observations), remaining=remaining),
        made=max(trial.started for trial in known.trials),
        tasks=len({group[0].task.name for group in groups(observations)}),
        observations=len(observations),
        seen=tuple(sorted(o.id for o in observations)),
    )
    (folder / "model.json").write_text(json.dumps(found.to_json(), separators=(",", ":")) + "\n", encoding="utf-8")
    return found


def shipped(folder: Path = SHIPPED) -> Knowledge:
    """What ships, whatever METAPEFT_HOME holds."""
    return Knowledge(tuple(Experience(Path("nowhere"), shipped=folder).trials()), profiling.shipped_profiles())


def compact(profile: Profile) -> str:
    """Six digits are more than the measurement has."""
    record = profile.to_json()
    record["features"] = {name: _short(value) for name, value in record["features"].items()}
    record["embedding"] = [_short(value) for value in record["embedding"]]
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def datasheet(trials: Sequence[Trial], profiles: dict[tuple[str, str], Profile]) -> str:
    """Markdown, made of nothing but the trials, the catalog and the plan."""
    ended = Counter(trial.status for trial in trials)
    places = {(trial.task, trial.task_version) for trial in trials}
    sizes = Counter(name for name, _ in places)
    full = [name for name in sizes if complete(name, trials)]
    profiled = sum((version, trial_backbone) in profiles for version, trial_backbone in _places(trials))
    parts = [
        "# The experience that ships with metapeft",
        "",
        "Made by `python -m metapeft.meta.ship` from trials. Do not edit.",
        "",
        f"{len(trials)} trials of {len(CONFIGURATIONS)} configurations of {len(METHODS)} methods on {len(sizes)} tasks "
        f"of the [catalog](tasks.md), {len(full)} of them with at least 4 configurations of every method, "
        f"{sum(n > 1 for n in sizes.values())} at two sizes of the training split; {profiled} of {len(places)} places "
        f"(a task at one size) have a profile. Backbone: {', '.join(sorted({t.backbone for t in trials}))}, as the "
        "package registry has it: a 4-bit file (GGUF, Q4_1), computed with in float32.",
        "",
        "It is what a first recommendation on a new machine stands on. The files are `metapeft/meta/shipped/"
        "experience.parquet` (one row per trial, for pandas) and `metapeft/profiling/shipped/`.",
        "",
        "## How it was made",
        "",
        "Every task got the same configurations (`metapeft/meta/plan.py`): of each method several, the learning "
        "rate and the structure varying. What is not listed there is the default. The order: what takes most "
        "variance from the table per second comes first, so cheap tasks are further than expensive ones. That is "
        "what `metapeft experience grow` does; after 366 trials a script that calls the same code with the same cells "
        "took over: first four configurations of every "
        "method on each of 36 tasks, the cheapest tasks first, then the same at the second size of 12 of them. "
        "After 991, the plan got the five rows beyond its highest learning rates: those of LoRA and AdaLoRA were run "
        "on all 36 tasks at one size, the others on 19 or 20 of them, where they turned out to be no better, on "
        "average, than what was there. "
        f"Training is {_range(t.budget for t in trials)} steps of batch 8; the data limits are those of "
        "`metapeft/search/grow.py`. The score is the task's metric on the test split, with the weights that were best "
        "on the validation split.",
        "",
        *_table(
            ("engine, device and versions", "trials"),
            [(name, str(n)) for name, n in Counter(made_with(t) for t in trials).most_common()],
        ),
        "",
        "`seconds` are wall time, some of it on machines that did other work at the same time or held a trial "
        "up: they say what a trial cost there, not what it costs; `cpu_seconds`, where measured (0: not), are "
        "those of the processor, over all its cores, and hardly know of other work. Predictions of time count work and "
        "measure this machine's speed (`metapeft/meta/costs.py`).",
        "",
        "## How trials ended",
        "",
        *_table(("status", "trials"), [(name, str(n)) for name, n in ended.most_common()]),
        "",
        *failures(trials),
        "## Methods",
        "",
        *_table(
            ("method", "trials", "diverged", "mean gain", "gain of the best", "median CPU seconds"),
            [method_row(name, [t for t in trials if t.method == name]) for name in METHODS],
        ),
        "",
        "The gain is the share of the untuned backbone's errors that are gone (below 0: of its hits that are lost), "
        "averaged over the places where the method was tried: over all its configurations there, and for the best one.",
        "",
        "## Noise",
        "",
        *noise(trials),
        "",
        "## Tasks",
        "",
        *_table(
            ("task", "kind", "licence", "train", "test", "untuned", "best", "by", *METHODS),
            [task_row(group) for _, group in sorted(by_place(trials).items())],
        ),
        "",
        "The last columns count configurations, repetitions with another seed in brackets.",
        "",
        "## Configurations",
        "",
        *_table(
            ("configuration", "places", "mean gain", "diverged"),
            [configuration_row(group) for group in by_configuration(trials)],
        ),
        "",
    ]
    return "\n".join(parts)


def complete(task: str, trials: Iterable[Trial]) -> bool:
    """Whether every method has at least 4 configurations on the task at one size."""
    tried: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for trial in trials:
        if trial.task == task:
            tried[trial.task_version][trial.method].add(key(trial.configuration))
    return any(all(len(of[method]) >= 4 for method in METHODS) for of in tried.values())


def made_with(trial: Trial) -> str:
    names = ("processor", "engine", "metapeft", "mlx", "python")
    return "; ".join([trial.device, *(f"{n} {trial.versions[n]}" for n in names if n in trial.versions)])


def failures(trials: Sequence[Trial]) -> list[str]:
    """The commonest reasons of everything that did not end well."""
    bad = [t for t in trials if t.status not in ("ok", "stopped")]
    reasons = Counter((t.status, t.method, re.sub(r"\d+(\.\d+)?", "N", t.error)) for t in bad)
    if not reasons:
        return []
    rows = [(status, method, error, str(n)) for (status, method, error), n in reasons.most_common(10)]
    return [*_table(("status", "method", "commonest reasons", "trials"), rows), ""]


def method_row(name: str, trials: Sequence[Trial]) -> tuple[str, ...]:
    gains: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if (found := gained(trial)) is not None:
            gains[trial.task_version].append(found)
    diverged = sum(t.status == "diverged" for t in trials)
    seconds = [t.cpu_seconds for t in trials if t.status == "ok" and t.cpu_seconds > 0]
    usual, best = _mean(map(fmean, gains.values())), _mean(map(max, gains.values()))
    return name, str(len(trials)), str(diverged), usual, best, _middle(seconds, 0)


def gained(trial: Trial) -> float | None:
    """None where it cannot be said."""
    if trial.status == "diverged":
        return 0.0
    if trial.score is None or trial.untuned_score is None or not math.isfinite(trial.score.value):
        return None
    return gain(trial.score.value, trial.untuned_score.value)


def noise(trials: Sequence[Trial]) -> list[str]:
    """What another seed changes, against what the size of the test split explains."""
    groups: dict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.score is not None and trial.status == "ok":
            groups[trial.task_version, key(trial.configuration)].append(trial)
    pairs = [group for group in groups.values() if len({t.seed for t in group}) > 1]
    if not pairs:
        return ["No configuration was run with two seeds yet."]
    broken = {(t.task_version, key(t.configuration)) for t in trials if t.status == "diverged"} & set(groups)
    changes = [abs(a.score.value - b.score.value) for a, b in (group[:2] for group in pairs) if a.score and b.score]
    deviation = math.sqrt(sum(change**2 for change in changes) / (2 * len(changes)))
    sampling = [trial.score.standard_error for group in pairs for trial in group if trial.score]
    tasks = len({group[0].task for group in pairs})
    return [
        f"{len(pairs)} configurations on {tasks} tasks were run with two seeds. The standard deviation of a score over "
        f"seeds is {deviation:.3f} (median change {median(changes):.3f}); the standard error that the size of the test "
        f"split gives is {median(sampling):.3f} (both seeds are scored on the same test rows). Left out: "
        f"{len(broken)} that diverged with one of the seeds.",
    ]


def task_row(trials: Sequence[Trial]) -> tuple[str, ...]:
    """One place: a task at one size."""
    first, entry = trials[0], entries()[trials[0].task]
    scored = [t for t in trials if t.score is not None and t.status in ("ok", "stopped")]
    best = max(scored, key=lambda t: t.score.value if t.score else -1.0, default=None)
    untuned = next((t.untuned_score for t in trials if t.untuned_score), None)
    counts = []
    for method in METHODS:
        own = [t for t in trials if t.method == method]
        rows = len({key(t.configuration) for t in own})
        counts.append(f"{rows} (+{len(own) - rows})" if len(own) > rows else str(rows))
    return (
        first.task,
        entry.kind,
        entry.licence,
        str(first.train_examples),
        str(best.score.n) if best and best.score else "",
        f"{untuned.value:.3f}" if untuned else "",
        f"{best.score.value:.3f} ± {best.score.standard_error:.3f}" if best and best.score else "",
        best.method if best else "",
        *counts,
    )


def configuration_row(trials: Sequence[Trial]) -> tuple[str, ...]:
    hidden = {"method", "batch_size"}
    defaults = next(row for row in plain() if key(row["full"]) == key(trials[0].configuration))
    text = ", ".join(f"{name}={value}" for name, value in defaults["given"].items() if name not in hidden)
    gains = [g for g in map(gained, trials) if g is not None]
    places = len({t.task_version for t in trials})
    diverged = sum(t.status == "diverged" for t in trials)
    return f"{trials[0].method}: {text}", str(places), _mean(gains), str(diverged)


def plain() -> list[dict[str, Any]]:
    """The plan's rows as they are written there, beside the full configurations that they stand for."""
    rows = configurations(LAYERS[DEFAULT_BACKBONE])
    return [{"given": given, "full": full} for given, full in zip(CONFIGURATIONS, rows, strict=True)]


def by_place(trials: Sequence[Trial]) -> dict[tuple[str, int], list[Trial]]:
    return _grouped(trials, lambda t: (t.task, -t.train_examples))


def by_configuration(trials: Sequence[Trial]) -> list[list[Trial]]:
    """In the order of the plan."""
    order = {key(row["full"]): n for n, row in enumerate(plain())}
    return [group for _, group in sorted(_grouped(trials, lambda t: order[key(t.configuration)]).items())]


def entries() -> dict[str, Any]:
    from metapeft.data import catalog

    return {entry.name: entry for entry in catalog.entries()}


def _places(trials: Iterable[Trial]) -> set[tuple[str, str]]:
    return {(trial.task_version, trial.backbone) for trial in trials}


def _grouped(trials: Iterable[Trial], by: Callable[[Trial], Any]) -> dict[Any, list[Trial]]:
    groups: dict[Any, list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[by(trial)].append(trial)
    return dict(groups)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [" | ".join(cells) for cells in (head, ["---"] * len(head), *rows)]
    return [f"| {line} |" for line in lines]


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{sum(found) / len(found):.2f}" if found else ""


def _middle(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f}" if values else ""


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return " to ".join(map(str, (found[0], found[-1])[: len(found)])) if found else "0"


def main() -> None:
    trials = ship(Experience(), SHIPPED / "experience.parquet", profiling.SHIPPED, DOCS)
    say(f"{len(trials)} trials in {SHIPPED / 'experience.parquet'}; see {DOCS}")
    version = fit_shipped(SHIPPED)
    say(f"a meta-model of {version.observations} observations of {version.tasks} tasks in {SHIPPED / 'model.json'}")


if __name__ == "__main__":
    main()
