"""One look at everything: `monitor(settings) -> Report`. Reads what is on disk; deterministic but for the servers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from metapeft.errors import MetapeftError
from metapeft.meta import decisions as given
from metapeft.meta import versions
from metapeft.meta.evidence import Observation
from metapeft.meta.experience import Experience
from metapeft.meta.knowledge import Knowledge, knowledge
from metapeft.monitoring import alerts as told
from metapeft.monitoring import benefit as benefits
from metapeft.monitoring import channels, drift, feedback, served, state
from metapeft.monitoring.alerts import RETRAINED, Alert
from metapeft.monitoring.benefit import Benefit
from metapeft.monitoring.outcomes import Decision, joined
from metapeft.monitoring.promise import promised
from metapeft.monitoring.remeasure import Remeasured
from metapeft.monitoring.watches import Finding, Limits, watch
from metapeft.profiling.profiles import SCALES
from metapeft.settings import Settings
from metapeft.tracking import models


@dataclass
class Report:
    """What a run found. watches: how each stands, with `known` saying what is missing where nothing can be said yet.

    new, over: keys of the alerts that were raised in this run, and of those that ended. undelivered: channel -> what.
    """

    at: str
    model: int
    decisions: int
    joined: int
    compared: int
    watches: list[dict[str, Any]]
    alerts: list[Alert]
    new: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    due: tuple[str, ...] = ()  # alerts to retrain for, which nobody has begun to do
    undelivered: dict[str, str] = field(default_factory=dict)
    servers: dict[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        return not self.alerts

    @property
    def retrain(self) -> bool:
        """Whether a new meta-model may mend what nobody has begun to retrain for."""
        return bool(self.due)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy, "retrain": self.retrain}


def monitor(
    settings: Settings,
    *,
    tell: bool = True,
    estimate: bool = True,
    again: Sequence[Remeasured] = (),
    retrains: str = "",
) -> Report:
    """Look, remember, and say what is new. again: profiles that were measured again; what differs is kept from here on.

    tell: False neither says nor remembers anything. estimate: whether the benefit of retraining is estimated when there
    is a new alert that it may mend (minutes). retrains: who retrains for what is due; it is due to no one else then,
    and to them again if they ask again. Raises UserError when METAPEFT_HOME cannot be written or a channel's address is
    none.
    """
    carried = channels.configured()
    with state.alone():
        remembered = state.read()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        report, seen = _look(settings, now, remembered, estimate, again)
        changes = state.compare(remembered, report.alerts, now)
        report.new, report.over = changes.new, changes.over
        if tell:
            takers = ("", retrains)
            report.due = tuple(a.key for a in report.alerts if a.retrain and remembered.alerts[a.key].taken in takers)
            remembered.servers, remembered.report = seen, report.to_json()
            remembered.remeasured |= {each.place: each.at for each in again if not each.moved}
            state.write(remembered)  # what is known is kept even if telling is interrupted
            report.undelivered = state.tell(remembered, carried)
            remembered.report = report.to_json()
            for key in report.due:
                remembered.alerts[key].taken = retrains
            state.write(remembered)
            for each in again:  # last: a kill before finds the same difference once more
                each.mend()
    return report


def _look(
    settings: Settings, now: str, remembered: state.State, estimate: bool, again: Sequence[Remeasured]
) -> tuple[Report, dict[str, dict[str, float]]]:
    champion, known = versions.champion(), knowledge(Experience())
    entries = [e for e in given.read() if e.get("model") == champion.number and e.keys() >= NEEDED]
    decisions = joined(entries, known.trials)
    observations = known.observations(champion.model.remaining)
    first = entries[0]["at"] if entries else now
    promise = promised(champion, _before(observations, known, first) if not champion.seen else observations)
    found: list[Alert] = []
    watches: list[dict[str, Any]] = []
    allowed = settings.monitor.false_alarms
    moved: dict[str, float] = {}
    findings: list[Finding] = []
    if promise and any(d.followed for d in decisions):
        findings += watch(decisions, promise, Limits(promise, decisions, allowed))
    else:
        missing = "a trial of a recommended configuration" if promise else f"{_least()} judged tasks in the experience"
        watches += [_unknown(name, missing) for name in ("regret", "order", "intervals", "chances", "seconds")]
    profiles = _profiles(champion, observations)
    rows, places = _incoming(decisions, known)
    if len(profiles.rows) >= drift.LEAST_KNOWN and len(rows) >= drift.LEAST_NEW:
        finding, moved = drift.watch(profiles, rows, places, allowed)
        findings.append(finding)
    else:
        need = f"{drift.LEAST_NEW} recommendations for different tasks, {drift.LEAST_KNOWN} profiled tasks tried before"
        watches.append(_unknown("profiles", need))
    gain = _benefit(findings, decisions, entries, observations, remembered, estimate)
    for finding in findings:
        alert = told.of_watch(finding, decisions, moved, gain if finding.watch in RETRAINED else None)
        watches.append(_standing(finding))
        if alert is not None:
            found.append(alert)
    mixed = told.of_profiles(again, now) or _owed(remembered)
    found += [mixed] if mixed is not None else []
    watches.append(_remeasured(again, remembered))
    try:
        for row, alert in _adapters(settings):
            watches.append(row)
            found += [alert] if alert is not None else []
    except MetapeftError as error:  # the registry is away: everything else is looked at, and what was known stays
        watches.append(_unknown("feedback", f"the registry, which could not be asked: {error}"))
        found += [_opened(o) for key, o in remembered.alerts.items() if key.startswith("feedback:")]
    health, seen = served.look(remembered.servers)
    for one in health:
        raised = told.of_server(one, now)
        found += raised
        watches.append(
            {
                "watch": f"serving:{one.server}",
                "value": one.errors / one.requests if one.requests else None,
                "expected": served.ERRORS,
                "evidence": None,
                "decisions": one.requests,
                "fires": bool(raised),
                "known": "",
            }
        )
    report = Report(
        at=now,
        model=champion.number,
        decisions=len(decisions),
        joined=sum(bool(d.followed) for d in decisions),
        compared=sum(d.regret is not None for d in decisions),
        watches=sorted(watches, key=lambda w: _ORDER.index(w["watch"]) if w["watch"] in _ORDER else len(_ORDER)),
        alerts=[_lasting(alert, remembered, now) for alert in found],
        servers=served.summed(health),
    )
    return report, {**remembered.servers, **seen}


NEEDED = {"id", "at", "task", "task_version", "backbone", "recommendations"}
_ORDER = ["regret", "order", "intervals", "chances", "profiles", "remeasured", "seconds"]


def _least() -> int:
    from metapeft.meta.evaluate import LEAST_JUDGED

    return LEAST_JUDGED


def _before(observations: Sequence[Observation], known: Knowledge, at: str) -> list[Observation]:
    """Of tasks that were tried before the first decision: what a model that was fitted to nothing predicts from."""
    began: dict[tuple[str, str], str] = {}
    for trial in known.trials:
        place = (trial.task_version, trial.backbone)
        began[place] = min(began.get(place, trial.started), trial.started)
    return [o for o in observations if began.get((o.task.version, o.task.backbone), at) < at]


def _profiles(champion: versions.Version, observations: Sequence[Observation]) -> drift.Profiles:
    """Of the tasks that the champion learned from (all known, where it was fitted to nothing)."""
    seen = set(champion.seen)
    tasks = {o.task: o.task for o in observations if o.task.features is not None and (not seen or o.id in seen)}
    rows = np.array([drift.scaled(t.features) for t in tasks if t.features is not None])
    return drift.Profiles(rows.reshape(len(rows), len(SCALES)), tuple(t.family for t in tasks))


def _incoming(decisions: Sequence[Decision], known: Knowledge) -> tuple[np.ndarray, list[int]]:
    """Profiles of the tasks that were asked about, each once, and by which decision first."""
    rows, places, met = [], [], set()
    for place, decision in enumerate(decisions):
        task = (decision.task_version, decision.backbone)
        if task in known.profiles and task not in met:
            met.add(task)
            rows.append(drift.scaled(known.profiles[task].features))
            places.append(place)
    return np.array(rows).reshape(len(rows), len(SCALES)), places


def _benefit(
    findings: Sequence[Finding],
    decisions: Sequence[Decision],
    entries: Sequence[dict[str, Any]],
    observations: Sequence[Observation],
    remembered: state.State,
    estimate: bool,
) -> Benefit | None:
    """Of retraining, when something that it may mend is worse; as it was estimated before while the alert lasts."""
    fired = [f for f in findings if f.fired is not None and f.watch in RETRAINED]
    if not fired:
        return None
    for finding in fired:
        earlier = remembered.alerts.get(finding.watch)
        if earlier is not None and earlier.alert.get("benefit"):
            return Benefit(**{k: earlier.alert["benefit"][k] for k in ("tasks", "now", "refitted", "error")})
    if not estimate:
        return None
    since = min(f.since or 0 for f in fired)
    return benefits.benefit(decisions[since:], observations, benefits.first_choices(entries))


def _standing(finding: Finding) -> dict[str, Any]:
    return {
        "watch": finding.watch,
        "value": told.finite(finding.value),
        "expected": told.finite(finding.expected),
        "evidence": told.finite(finding.evidence),
        "decisions": finding.decisions,
        "fires": finding.fired is not None,
        "known": "" if finding.decisions else "no decision tells of it yet",
    }


def _unknown(name: str, missing: str) -> dict[str, Any]:
    return {"watch": name, "value": None, "expected": None, "evidence": None, "decisions": 0, "fires": False} | {
        "known": f"needs {missing}"
    }


def _owed(remembered: state.State) -> Alert | None:
    """The alert of an earlier run that mended its cause, while a channel still owes it."""
    earlier = remembered.alerts.get("remeasured")
    if earlier is None or set(channels.configured()) <= set(earlier.told):
        return None
    return _opened(earlier)


def _opened(earlier: state.Open) -> Alert:
    """As it was raised."""
    return Alert(**{**earlier.alert, "kinds": tuple(earlier.alert["kinds"])})


def _lasting(alert: Alert, remembered: state.State, now: str) -> Alert:
    """What began when it was first seen began then, not at the latest look."""
    earlier = remembered.alerts.get(alert.key)
    return replace(alert, since=earlier.alert["since"]) if earlier is not None and alert.since == now else alert


def _remeasured(again: Sequence[Remeasured], remembered: state.State) -> dict[str, Any]:
    if not again and not remembered.remeasured:
        return _unknown("remeasured", "a task of a recommendation whose rows are still here")
    wrong = sum(bool(each.moved) for each in again)
    return {
        "watch": "remeasured",
        "value": wrong / len(again) if again else 0.0,
        "expected": 0.0,
        "evidence": float(wrong > 0),
        "decisions": len({*remembered.remeasured, *(each.place for each in again)}),
        "fires": wrong > 0,
        "known": "",
    }


def _adapters(settings: Settings) -> list[tuple[dict[str, Any], Alert | None]]:
    """Every adapter version that has feedback, against its registered score."""
    said: dict[str, list[feedback.Feedback]] = {}
    for one in feedback.read():
        said.setdefault(one.model, []).append(one)
    if not said:
        return []
    registered = {f"{m.name}@{m.version}": m for m in models.list_models(settings)}
    found = []
    for name, answers in sorted(said.items()):
        model = registered.get(name)
        if model is None or model.metric == "macro_f1" or not math.isfinite(model.score):
            continue  # the backbone alone, a version that is gone, or a score that no single answer has
        error = model.standard_error if math.isfinite(model.standard_error) else 0.0
        seen = feedback.watch(name, [a.verdict == "right" for a in answers], model.score, error)
        since = answers[seen.since].at if seen.since is not None else ""
        back = f"`metapeft models rollback {model.name}` gives the version before back." if model.version > 1 else None
        row = {
            "watch": f"feedback:{name}",
            "value": told.finite(seen.accuracy),
            "expected": seen.promised,
            "evidence": seen.evidence,
            "decisions": seen.answers,
            "fires": seen.fired is not None,
            "known": "",
        }
        found.append((row, told.of_feedback(seen, since, back, model.metric)))
    return found
