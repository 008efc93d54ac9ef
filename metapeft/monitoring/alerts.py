"""What a person is told: what got worse, since when, how sure that is, on which kinds of task, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metapeft.monitoring.benefit import Benefit
from metapeft.monitoring.feedback import Served
from metapeft.monitoring.outcomes import Decision
from metapeft.monitoring.served import Health
from metapeft.monitoring.watches import Finding
from metapeft.tracking.models import HELD_OUT

if TYPE_CHECKING:
    from metapeft.monitoring.remeasure import Remeasured

Severity = Literal["critical", "warning"]
RETRAINED = ("regret", "order", "intervals", "chances", "profiles")  # what a new meta-model may mend
KINDS = 5  # kinds of task that are named


@dataclass(frozen=True)
class Alert:
    """key: the same for the same trouble, run after run. since: ISO 8601, UTC ("" where it cannot be told).

    chance: of so much evidence without any change (in 1,000 decisions), None where the test gives none. kinds: the
    kinds of task that are worse, the worst first. retrain: whether fitting the meta-model anew may help.
    """

    key: str
    severity: Severity
    title: str
    text: str
    do: str
    since: str
    value: float | None
    expected: float | None
    chance: float | None
    kinds: tuple[str, ...] = ()
    retrain: bool = False
    benefit: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def surely(chance: float) -> str:
    return f"in {chance:.1%} of 1,000-decision histories without any change the evidence gets so strong, or in fewer"


TITLES = {
    "regret": "The first choice is further from the best than promised",
    "order": "The ranking of configurations is worse than promised",
    "intervals": "Scores fall outside their 90 % intervals more often than promised",
    "chances": "The stated chances are wrong",
    "seconds": "Trainings take longer or shorter than predicted, differently from before",
    "profiles": "Incoming tasks are unlike those that the meta-model learned from",
}
DO = {
    "regret": "let trials run on such tasks and fit anew: the DAG grow_and_retrain, or `metapeft experience grow` and"
    " `metapeft meta train`. If a new meta-model was promoted shortly before: `metapeft meta rollback`.",
    "intervals": "fit anew (`metapeft meta train`); until then take intervals for narrower than they should be.",
    "seconds": "look at the machine: another device, a lost BLAS (`metapeft doctor`), other work on it. Trials that are"
    " measured now correct the prediction by themselves.",
    "profiles": "look at the features named: if data or profiling changed by mistake, mend that. If the tasks are"
    " really new, let trials run on some of them and fit anew (DAG grow_and_retrain).",
}
TELLS: dict[str, Callable[[Decision], bool]] = {  # whether a decision says something
    "regret": lambda d: d.regret is not None,
    "order": lambda d: d.disorder is not None,
    "intervals": lambda d: d.outside is not None,
    "chances": lambda d: d.chances is not None,
    "seconds": lambda d: d.slowness is not None,
    "profiles": lambda d: True,
}
DO["order"] = DO["regret"]
DO["chances"] = DO["intervals"]


def of_watch(
    finding: Finding,
    decisions: Sequence[Decision],
    moved: Mapping[str, float] | None = None,
    benefit: Benefit | None = None,
) -> Alert | None:
    """None while it does not fire. moved: features of profiles, with the difference of their means in usual spreads."""
    if finding.fired is None:
        return None
    name = finding.watch
    worse = decisions[finding.since or 0 : finding.fired + 1]
    told = {
        "regret": f"Of what was tried, the first choice was {100 * finding.at_alarm:.1f} points below the best;"
        f" {100 * finding.expected:.1f} were promised",
        "order": f"{finding.at_alarm:.0%} of the differences were predicted the wrong way round;"
        f" {finding.expected:.0%} were promised (guessing gets 50 %)",
        "intervals": f"{finding.at_alarm:.0%} of the scores were outside; {finding.expected:.0%} were promised",
        "chances": f"Chances were off by {100 * finding.at_alarm:.0f} percentage points on average;"
        f" {100 * finding.expected:.0f} are usual",
        "seconds": f"Measured seconds were {_times(finding.at_alarm)} times the predicted ones;"
        f" {_times(finding.expected)} times at first",
        "profiles": f"Most different in the mean, in spreads of the known tasks: {_shifts(moved or {})}. The population"
        f" stability index of all features is {finding.at_alarm:.2f}; chance alone makes {finding.expected:.2f}",
    }[name]
    retrain = name in RETRAINED
    do = DO[name]
    if retrain and benefit is not None and benefit.tasks:
        do += f" {benefit.said()}"
    return Alert(
        key=name,
        severity="warning" if name in ("seconds", "profiles") else "critical",
        title=TITLES[name],
        text=f"{told}, over {sum(TELLS[name](d) for d in worse)} decisions.",
        do=do,
        since=decisions[finding.since or 0].at,
        value=finite(finding.at_alarm),
        expected=finite(finding.expected),
        chance=finding.chance,
        kinds=kinds(worse, name),
        retrain=retrain,
        benefit=benefit.to_json() if retrain and benefit is not None and benefit.tasks else {},
    )


def of_profiles(again: Sequence[Remeasured], since: str) -> Alert | None:
    """None where every profile that was measured again is as it was kept."""
    wrong = [each for each in again if each.moved]
    if not wrong:
        return None
    shown = "; ".join(f"{each.task.name}: {_shifts(dict(list(each.moved.items())[:3]))}" for each in wrong[:KINDS])
    return Alert(
        key="remeasured",
        severity="critical",
        title="Kept profiles are not what their tasks measure like",
        text=f"{len(wrong)} of {len(again)} profiles that were measured again differ, in usual spreads: {shown}. What"
        " was measured now is kept from here on; what was recommended for these tasks stands on the old ones.",
        do="restart what profiles tasks (servers, workers): it measured in a wrong state, or with other versions"
        " (`metapeft doctor`). Ask for these recommendations again, and fit anew (`metapeft meta train`): the present"
        " meta-model may have learned from wrong profiles.",
        since=since,
        value=len(wrong) / len(again),
        expected=0.0,
        chance=None,
        kinds=tuple(each.task.name for each in wrong[:KINDS]),
        retrain=True,
    )


def _times(logarithm: float) -> str:
    """A factor, to two digits, from its logarithm to the base of two."""
    return f"{float(f'{2**logarithm:.2g}'):g}"


def _shifts(moved: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {shift:+.1f}" for name, shift in moved.items())


def kinds(worse: Sequence[Decision], name: str) -> tuple[str, ...]:
    """Kinds of task among these decisions, by how much each adds to what is wrong."""
    values = {"regret": lambda d: d.regret, "order": lambda d: d.disorder, "intervals": lambda d: d.outside}
    measure = values.get(name, lambda d: 1.0)
    sums: dict[str, list[float]] = {}
    for decision in worse:
        value = measure(decision)  # type: ignore[no-untyped-call]
        if value:
            sums.setdefault(decision.like, []).append(float(value))
    order = sorted(sums, key=lambda kind: (-float(np.sum(sums[kind])), kind))
    return tuple(f"{kind} ({len(sums[kind])})" for kind in order[:KINDS])


def of_feedback(found: Served, since: str, before: str | None, metric: str) -> Alert | None:
    """before: how to give the version before back, where there is one. metric: of its score."""
    if found.fired is None:
        return None
    return Alert(
        key=f"feedback:{found.model}",
        severity="critical",
        title=f"{found.model} is right less often than its score promises",
        text=f"{found.accuracy:.1%} of the last {min(100, found.answers)} judged answers were right;"
        f" {found.promised:.1%} {'of the held-out shots' if metric.endswith(HELD_OUT) else 'on the test split'}.",
        do=(f"look at what is asked of it: is it still the task that it was trained on? {before or ''}".strip())
        + " Then train it again on newer rows (`metapeft train`). Callers may report mistakes more often than what went"
        " well: if so, let them judge a random share of the answers.",
        since=since,
        value=finite(found.accuracy),
        expected=finite(found.promised),
        chance=None,
    )


def of_server(health: Health, since: str) -> list[Alert]:
    found = []
    if health.failing:
        do = "read its log (a line of JSON per request), look at /healthz and at memory, restart it."
        text = "It is listed as running, and does not answer."
        if health.reached:
            text = f"{health.errors} of {health.requests} requests since the last look failed inside (5xx)."
        elif health.ours == "address":
            text = "That is no address: it begins with neither http:// nor https://."
            do = "correct METAPEFT_SERVER."
        elif health.ours == "key":
            text = "It answers, and refuses to say how it is: its key is wrong, or may not read /metrics."
            do = "set METAPEFT_SERVER_KEY to a key of that server (`metapeft keys create` there)."
        elif health.killed:
            text = "Its process is gone and did not end in order: it was killed, or memory ran out."
            do = f"start it again; if it is not to run any more, remove {health.killed}."
        found.append(
            Alert(
                key=f"serving:errors:{health.server}",
                severity="critical",
                title=f"The server at {health.server} fails",
                text=text,
                do=do,
                since=since,
                value=health.errors / health.requests if health.requests else None,
                expected=0.01,
                chance=health.error_chance if health.reached else None,
            )
        )
    if health.slowed:
        found.append(
            Alert(
                key=f"serving:slow:{health.server}",
                severity="warning",
                title=f"The server at {health.server} is slow",
                text=f"{health.slow} of {health.answers} answers since the last look took more than 30 s.",
                do="look at its queue (metapeft_engine_waiting) and at other work on the machine; lower --queue so that"
                " callers hear of it, or add a server.",
                since=since,
                value=health.slow / max(1, health.answers),
                expected=0.05,
                chance=health.slow_chance,
            )
        )
    return found


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
