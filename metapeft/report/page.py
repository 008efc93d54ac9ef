"""One HTML page about a task's tuning that needs nothing beside itself: style, pictures and script are in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from metapeft.data.task import SPLITS, Task
from metapeft.report import charts, parallel, switched, tables, wording
from metapeft.search import pareto
from metapeft.training.trial import Trial

MOST_BARS = 8
MOST_CHARACTERS = 240  # of a row's text or answer
WIDE, NARROW = 820, 358  # pixels between the margins on a desktop and on a phone


@dataclass
class Content:
    """What a report is about. Only the task is needed; whatever else is there is shown.

    trials: of the sweep, in their order. infeasible: trial id -> which limit it breaks, or how it ended (`Sweep`).
    final: the trial whose adapter is kept. recommendation, profile, validation: their JSON. environment: `describe()`
    and `versions()` of the runtime. called: the task as the user names it on the command line. model: registered name.
    switching: the record of the final training, where its method could be exchanged. examples: rows of the test split
    with the answers to them (see `stages.examples`).
    """

    task: Task
    trials: Sequence[Trial] = ()
    infeasible: Mapping[str, str] = field(default_factory=dict)
    adapters: bool = False  # whether small adapters were an objective of the sweep
    final: Trial | None = None
    recommendation: Mapping[str, Any] | None = None
    profile: Mapping[str, Any] | None = None
    validation: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    called: str = ""
    model: str = ""
    switching: Mapping[str, Any] | None = None
    examples: Sequence[Mapping[str, Any]] = ()

    def feasible(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.id not in self.infeasible]

    def untuned(self) -> float | None:
        """The untuned backbone's test score, wherever it was measured."""
        known = [t.untuned_score for t in (self.final, *self.trials) if t is not None and t.untuned_score is not None]
        return known[0].value if known else None

    def kept(self) -> str:
        """Id of the sweep's trial with the configuration that is kept, however often either is evaluated; "" where the
        sweep has none."""
        if self.final is None:
            return ""
        wanted = self.final.configuration | {"evaluations": 0}
        return next((t.id for t in self.trials if t.configuration | {"evaluations": 0} == wanted), "")

    def trainings(self) -> Sequence[Trial]:
        """Those whose learning is drawn: the sweep's, or where there was none the final one; what switched has a
        picture of its own."""
        return self.trials or ([self.final] if self.final is not None and self.switching is None else [])

    def best(self) -> str:
        """Id of the trial that the pictures emphasise."""
        if same := self.kept():
            return same
        if not self.trials and self.final is not None:
            return self.final.id
        names = pareto.named(self.feasible(), self.adapters)
        return names["most accurate"].id if names else ""


def render(content: Content) -> str:
    """The page. Everything from outside is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("metapeft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        task=content.task,
        subtitle=_subtitle(content),
        final=_final(content),
        examples=_examples(content),
        switching=_switching(content),
        sweep=_sweep(content),
        search=_search(content),
        learning=_learning(content),
        recommendation=_recommendation(content),
        trials=_trials(content),
        data=_data(content),
        validation=_validation(content),
        profile=_profile(content),
        environment=_environment(content),
        footer=_footer(content),
    )


def _picture(draw: Any) -> tuple[Any, Any]:
    """The same chart for a desktop and for a phone, as safe markup."""
    from markupsafe import Markup

    return Markup(draw(WIDE)), Markup(draw(NARROW))


def _subtitle(content: Content) -> str:
    task = content.task
    trial = content.final or (content.trials[0] if content.trials else None)
    parts = [f"{task.kind}, {wording.metric(task.metric)}"]
    if trial is not None:
        parts.append(trial.backbone)
        parts.append(trial.started[:10])
    return " · ".join(part for part in parts if part)


def _final(content: Content) -> dict[str, Any] | None:
    trial = content.final
    if trial is None:
        return None
    found = trial.score or trial.validation
    method = wording.method(trial.method)
    if found is None:
        ended = wording.ending(trial.status)
        sentence = f"The final training with {method} ended without a score: {ended}."
    else:
        split = "test" if trial.score else "validation"
        sentence = (
            f"{method[0].upper()}{method[1:]} reaches {wording.score(found.value)} {wording.metric(found.metric)}"
        )
        sentence += f" on {found.n} {split} examples"
        before = trial.untuned_score
        if before is not None and trial.score is not None:
            change = 100 * (found.value - before.value)
            more = f"{abs(change):.1f} points {'more' if change > 0 else 'less'} than"
            sentence += f", {'as much as' if abs(change) < 0.05 else more} the untuned backbone"
        sentence += "."
    bars: list[tuple[str, float, float, str]] = []
    if trial.untuned_score is not None:
        bars.append(("untuned backbone", trial.untuned_score.value, trial.untuned_score.standard_error, "before"))
    if found is not None:
        bars.append((f"with {method}", found.value, found.standard_error, "tuned"))
    facts = [
        ("training time", wording.duration(trial.train_seconds or trial.seconds)),
        ("peak memory", wording.memory(trial.peak_memory_mb)),
        ("adapter", wording.size(trial.adapter_bytes)),
        ("trained parameters", wording.number(trial.trained_parameters)),
        ("steps", str(trial.budget)),
    ]
    if content.model:
        facts.append(("registered as", content.model))
    return {
        "sentence": sentence,
        "bars": _picture(lambda width: charts.comparison(bars, width)) if bars else None,
        "caption": f"{_begun(wording.metric(found.metric))} with one standard error." if found else "",
        "facts": facts,
        "command": _parts(pareto.command(trial, content.called or None)),
    }


def _begun(text: str) -> str:
    """As a sentence begins; `capitalize` would make F1 an f1."""
    return text[:1].upper() + text[1:]


def _examples(content: Content) -> list[dict[str, Any]]:
    return [
        {name: _shortened(row[name]) for name in ("text", "expected", "untuned", "tuned")} | {"right": row["right"]}
        for row in content.examples
    ]


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1].rstrip() + "…"


def _switching(content: Content) -> dict[str, Any] | None:
    found = content.switching
    if not found:
        return None
    return {
        "sentence": switched.sentence(found),
        "chart": _picture(lambda width: switched.chart(found, width, content.untuned())),
        "rows": switched.rows(found),
    }


def _parts(command: str) -> list[str]:
    """A command cut before each option: where a line may break."""
    return re.split(r" (?=--)", command)


def _sweep(content: Content) -> dict[str, Any]:
    feasible = content.feasible()
    rows = pareto.explain(feasible, content.called or None, content.adapters)
    titles = pareto.titles(feasible, content.adapters)
    counts = Counter(trial.method for trial in content.trials)
    judged = [score for trial in content.trials if (score := pareto.judged(trial)) is not None]
    metric = wording.metric(judged[0].metric) if judged else wording.metric(content.task.metric)
    return {
        "sentence": _sweep_sentence(content, len(rows)),
        "order": " ".join(tables.order(rows)),
        "metric": metric,
        "goals": _goals(content),
        "legend": [(name, wording.method(name), counts[name]) for name in wording.METHODS if counts[name]],
        "chart": _picture(lambda width: charts.trade_offs(feasible, width, content.untuned(), content.adapters)),
        "points": [
            {
                "title": titles[row.trial],
                "key": row.method,
                "method": wording.method(row.method),
                "score": wording.plus_minus(row.score, row.standard_error)
                + (f" ({row.runs} seeds)" if row.runs > 1 else ""),
                "test": wording.score(row.test_score) if row.test_score is not None else "",
                "seconds": wording.duration(row.seconds),
                "memory": wording.memory(row.peak_memory_mb),
                "size": wording.size(row.adapter_bytes) if row.adapter_bytes else "",
                "configuration": wording.configuration(row.configuration, pareto.searched(row.method)),
                "command": _parts(row.command),
            }
            for row in rows
            if row.names
        ],
    }


def _goals(content: Content) -> str:
    return "score, training time, memory and adapter size" if content.adapters else "score, training time and memory"


def _sweep_sentence(content: Content, front: int) -> str:
    total = len(pareto.averaged(content.trials))
    ended = Counter[str](trial.status for trial in content.trials)
    out = [why for t in content.trials if t.status == "ok" and (why := content.infeasible.get(t.id))]
    limited = sum(map(_is_limit, out))
    text = f"{total} configuration{'' if total == 1 else 's'} {'was' if total == 1 else 'were'} tried"
    if front:
        text += f"; {front} {'is a' if front == 1 else 'are'} best trade-off{'' if front == 1 else 's'}"
    text += f" of {_goals(content)}." if front else ", none with a usable result."
    odd = [f"{ended[status]} {said}" for status, said in wording.ENDINGS.items() if ended[status]]
    odd += [f"{limited} broke a limit"] if limited else []
    odd += [f"{len(out) - limited} did not end well with every seed"] if len(out) > limited else []
    if total < len(content.trials):
        text += f" {len(content.trials) - total} of the trainings repeat the best with other seeds; scores are means."
    return text + (f" Not in the picture: {', '.join(odd)}." if odd else "")


def _search(content: Content) -> dict[str, Any]:
    """How the search went, and what it says about the hyperparameters."""
    from metapeft.search.importance import importance

    feasible = content.feasible()
    grew = [
        (time, trial) for time, trial in zip(accumulate(t.seconds for t in content.trials), content.trials, strict=True)
    ]
    times = [time for time, trial in grew if trial.id not in content.infeasible]
    grown = pareto.progress(feasible)
    found = [row for row in importance(content.trials) if row.share >= 0.01]
    found = sorted(found, key=lambda row: -row.share)[:MOST_BARS]
    bars = [
        (
            wording.spoken(row.name) + (f" of {wording.method(row.method)}" if row.method else ""),
            row.share,
            f"m-{row.method}",
            "" if row.method else wording.method(row.best),
        )
        for row in found
    ]
    return {
        "parallel": _picture(lambda width: parallel.chart(feasible, width, content.adapters)),
        "growth": _picture(lambda width: charts.growth(times, grown, width)),
        "importance": _picture(lambda width: charts.shares(bars, width)),
    }


def _learning(content: Content) -> dict[str, Any]:
    best = content.best()
    half = (WIDE - 20) // 2

    def draw(quantity: str, untuned: float | None) -> tuple[Any, Any]:
        return _picture(
            lambda width: charts.curves(content.trainings(), half if width == WIDE else width, quantity, untuned, best)
        )

    chosen = next((trial for trial in content.trials if trial.id == best), None)
    caption = (
        f"The thick line is the {'one that was kept' if content.kept() else 'most accurate one'}." if chosen else ""
    )
    return {
        "score": draw("validation_score", content.untuned()),
        "loss": draw("validation_loss", None),
        "caption": caption,
    }


def _recommendation(content: Content) -> dict[str, Any] | None:
    from markupsafe import Markup

    found = content.recommendation
    if not found or not found.get("recommendations"):
        return None
    entries = found["recommendations"]
    spans = [_span(entry) for entry in entries]
    known = [span for span in spans if span is not None]
    low, high = min((s[1] for s in known), default=0.0), max((s[2] for s in known), default=1.0)
    scale = (low, high) if high > low else (low - 0.05, high + 0.05)
    level = next((entry["score"].get("level") for entry in entries if _span(entry) is not None), None)
    rows = [
        {
            "key": entry["method"],
            "rank": entry["rank"],
            "method": wording.method(entry["method"]),
            "score": wording.score(span[0]) if span else "not known",
            "range": f"{wording.score(span[1], 0)} to {wording.score(span[2], 0)}" if span else "",
            "bar": Markup(charts.interval(*span, scale)) if span else "",
            "p_best": wording.probability(entry.get("p_best")),
            "seconds": wording.duration(entry.get("seconds")),
            "memory": wording.memory(entry.get("peak_memory_mb")),
            "size": wording.size(entry.get("adapter_bytes")),
            "configuration": wording.configuration(entry["configuration"], pareto.searched(entry["method"])),
        }
        for entry, span in zip(entries, spans, strict=True)
    ]
    similar = found.get("neighbours") or ()
    neighbours = [f"{n['task']} ({wording.score(n['similarity'], 0)})" for n in similar]
    if found.get("basis") == "experience":
        sentence = "From earlier trials on other tasks, weighted by how similar those tasks are."
    else:
        sentence = "There is too little experience with tasks like this one: these usually do well."
    if level:
        sentence += f" The bars are {wording.score(level, 0)} intervals."
    return {"sentence": sentence, "rows": rows, "neighbours": ", ".join(neighbours)}


def _span(entry: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """(mean, low, high) of an expected score; None where a portfolio says nothing about the score."""
    score = entry.get("score") or {}
    mean, low, high = (score.get(name) for name in ("mean", "low", "high"))
    return None if mean is None or low is None or high is None else (mean, low, high)


def _trials(content: Content) -> list[dict[str, Any]]:
    titles = pareto.titles(content.feasible(), content.adapters)
    rows = []
    for trial in content.trials:
        judged = pareto.judged(trial)
        rows.append(
            {
                "key": trial.method,
                "method": wording.method(trial.method),
                "names": titles.get(trial.id, ""),
                "problem": "" if trial.status == "ok" and judged else wording.ending(trial.status),
                "score": wording.plus_minus(judged.value, judged.standard_error) if judged else "–",
                "test": wording.score(trial.score.value) if trial.score else "–",
                "seconds": wording.duration(trial.train_seconds or trial.seconds),
                "memory": wording.memory(trial.peak_memory_mb),
                "configuration": wording.configuration(trial.configuration, pareto.searched(trial.method)),
                "error": trial.error or _limit(content.infeasible.get(trial.id), trial),
            }
        )
    return rows


def _limit(why: str | None, trial: Trial) -> str:
    if not why or trial.status != "ok":
        return ""
    return f"breaks the limit on {why}" if _is_limit(why) else why


def _is_limit(why: str) -> bool:
    return set(why.split(", ")) <= {"seconds", "memory"}


def _data(content: Content) -> dict[str, Any]:
    task = content.task
    facts = [("examples", ", ".join(f"{wording.number(len(task.split(name)))} {name}" for name in SPLITS))]
    if task.labels:
        shown = ", ".join(task.labels[:8]) + (f" and {len(task.labels) - 8} more" if len(task.labels) > 8 else "")
        facts.append(("labels", shown))
    facts += [(name, value) for name, value in (("source", task.source), ("licence", task.licence)) if value]
    facts.append(("content version", task.version))
    if task.dvc_id:
        facts.append(("DVC id", task.dvc_id))
    return {"facts": facts, "notes": task.notes}


def _validation(content: Content) -> dict[str, Any] | None:
    found = content.validation
    if not found:
        return None
    checks = found["checks"]
    marks = Counter("ok" if check["ok"] else check["severity"] for check in checks)
    if len(checks) == marks["ok"]:
        sentence = f"All {len(checks)} checks passed."
    else:
        odd = [f"{marks[kind]} {kind}{'s' if marks[kind] > 1 else ''}" for kind in ("error", "warning") if marks[kind]]
        sentence = f"{marks['ok']} of {len(checks)} checks passed: {' and '.join(odd)}."
    kinds = {"ok": "ok", "warning": "warn", "error": "bad"}
    rows = []
    for check in sorted(checks, key=lambda check: bool(check["ok"])):
        mark = "ok" if check["ok"] else check["severity"]
        rows.append({"name": check["name"], "result": mark, "kind": kinds.get(mark, "warn"), "detail": check["detail"]})
    return {"sentence": sentence, "rows": rows}


def _profile(content: Content) -> list[tuple[str, str]]:
    features = (content.profile or {}).get("features") or {}
    plain = {name: value for name, value in features.items() if not re.fullmatch(r"domain_\d+", name)}  # say nothing
    return [(wording.spoken(name), wording.number(value)) for name, value in plain.items()]


def _environment(content: Content) -> list[tuple[str, str]]:
    return [
        (wording.spoken(name), wording.number(value))
        for name, value in content.environment.items()
        if value not in ("", None)
    ]


def _footer(content: Content) -> str:
    trial = content.final or (content.trials[0] if content.trials else None)
    version = (trial.versions.get("metapeft") if trial else None) or ""
    return f"Written by metapeft {version}".strip() + "."
