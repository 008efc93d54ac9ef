"""What is watched in the decisions of the champion, and when it counts as worse than promised.

    regret      best score measured among the listed configurations less that of the first choice
    order       share of the measured differences that was predicted the wrong way round; of three measured or more.
                Says sooner than regret that a ranking is worth nothing: every pair of configurations counts
    intervals   share of measured scores outside their 90 % interval
    chances     expected calibration error of P(within 1 %) over the last decisions
    seconds     log2 of measured over predicted seconds: another machine, or another load on it

Regret, order and intervals are watched by Page-Hinkley (river) and by a window, chances by a window; values are what
is beyond the promise for a decision that was followed in the same way (`promise.Promise.of`), so that they are about
zero while the promise holds. Limits: `limits`. Seconds have no promise: they are compared with how they began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from metapeft.monitoring.limits import (
    HORIZON,
    LEAST,
    RUNS,
    WINDOW,
    Limit,
    drawn,
    highest,
    page_hinkley,
    windowed,
    windows,
    worlds,
)  # fmt: skip
from metapeft.monitoring.outcomes import BINS, Decision, Kind, ece
from metapeft.monitoring.promise import Followed, Promise
from metapeft.settings import MonitorSettings

# False alarms per 1,000 decisions that each test may give, as shares of what is allowed in all. "profiles": `drift`.
SHARES = {
    ("regret", "page_hinkley"): 0.20,
    ("regret", "window"): 0.15,
    ("order", "page_hinkley"): 0.20,
    ("order", "window"): 0.05,
    ("intervals", "page_hinkley"): 0.05,
    ("intervals", "window"): 0.05,
    ("chances", "window"): 0.05,
    ("seconds", "window"): 0.05,
    ("profiles", "ks"): 0.05,
    ("profiles", "means"): 0.15,
}
FALSE_ALARMS = MonitorSettings().false_alarms  # per 1,000 decisions, of all tests together
SMALLEST = {"regret": 0.03, "order": 0.10, "intervals": 0.20}  # what has to be found; half of it is tolerated
WEIGHT = 200  # decisions that the promise counts for, as the mean that Page-Hinkley starts with


@dataclass(frozen=True)
class Finding:
    """How one watch stands. evidence: the highest statistic over its limit, from 1 on there is an alarm.

    fired: index, among all decisions, of the one that raised the alarm that lasts; since: of the first one that was
    worse, as far as can be told. chance: of so much evidence in 1,000 decisions without any change. alarms: indices of
    all alarms so far. decisions: how many it looked at.
    """

    watch: str
    value: float  # over the last window
    expected: float
    evidence: float
    test: str
    chance: float
    decisions: int
    fired: int | None = None
    since: int | None = None
    alarms: tuple[int, ...] = ()
    at_alarm: float = 0.0  # the value over what was worse until the alarm


MEANS: dict[str, Callable[[Followed], np.ndarray]] = {
    "regret": lambda f: f.regret,
    "order": lambda f: f.disorder,
    "intervals": lambda f: f.outside,
}


SEEN: dict[str, Callable[[Decision], float | None]] = {
    "regret": lambda d: d.regret,
    "order": lambda d: d.disorder,
    "intervals": lambda d: d.outside,
}


def usual(table: np.ndarray) -> float:
    """Mean of what is known; 0 where nothing is."""
    return float(np.nanmean(table)) if np.isfinite(table).any() else 0.0


class Limits:
    """Of all tests, for decisions that are followed like these. Made when first asked for."""

    def __init__(
        self, promise: Promise, decisions: Sequence[Decision], false_alarms: float = FALSE_ALARMS, seed: int = 0
    ):
        self.promise, self.false_alarms, self.seed = promise, false_alarms, seed
        told = {name: [_followed(d.kind) for d in decisions if see(d) is not None] for name, see in SEEN.items()}
        self.kinds = told | {"chances": told["regret"]}

    @cached_property
    def made(self) -> Mapping[tuple[str, str], Limit]:
        random = np.random.default_rng(self.seed)
        tasks = drawn(worlds(self.promise.families, random), HORIZON, random)
        found: dict[tuple[str, str], np.ndarray] = {}
        for name, kinds in self.kinds.items():
            known = Counter(kinds or [Kind(1)])
            told = [self.promise.of(kind) for kind in known]
            share = np.array(list(known.values())) / sum(known.values())
            kind = random.choice(len(told), size=tasks.shape, p=share)
            which = random.integers(told[0].regret.shape[1], size=tasks.shape)
            if name == "chances":
                found[name, "window"] = self._chances(told, kind, tasks, which)
                continue
            beyond = np.array([MEANS[name](t) - usual(MEANS[name](t)) for t in told])[kind, tasks, which]
            beyond = np.nan_to_num(beyond)  # no order: nothing is told, nothing moves
            found[name, "page_hinkley"] = highest(page_hinkley(beyond, WEIGHT, SMALLEST[name] / 2))
            found[name, "window"] = highest(windows(beyond))
        return {name: Limit(values, self.false_alarms * SHARES[name]) for name, values in found.items()}

    def _chances(self, told: list, kind: np.ndarray, tasks: np.ndarray, which: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        table = np.array([t.chances for t in told], dtype=np.float32)
        found = [  # in pieces: (length, BINS, 3) for every run
            sliding_ece(table[k, t, w][None]).max() for k, t, w in zip(kind, tasks, which, strict=True)
        ]
        return np.sort(found)


def sliding_ece(chances: np.ndarray) -> np.ndarray:
    """(runs, length, BINS, 3) -> ECE of the last WINDOW decisions, for fewer as if it were more certain than it is."""
    counts = np.minimum(np.arange(chances.shape[1]) + 1, WINDOW)
    found = ece(windowed(chances, axis=1)) * np.sqrt(counts / WINDOW)
    return np.where(counts >= WINDOW // 2, found, -np.inf)


def watch(decisions: Sequence[Decision], promise: Promise, limits: Limits) -> list[Finding]:
    """Of the champion's decisions, the oldest first. Those without an outcome count as decisions only."""
    made, found = limits.made, []
    for name, measure in SEEN.items():
        places = [i for i, d in enumerate(decisions) if measure(d) is not None]
        values = np.array([measure(decisions[i]) for i in places], dtype=float)
        kinds = [_followed(decisions[i].kind) for i in places]
        cut = np.minimum(values, promise.cap) if name == "regret" else values
        usually = np.array([usual(MEANS[name](promise.of(k))) for k in kinds])
        found.append(_mean(name, values, cut, usually, places, made))
    places = [i for i, d in enumerate(decisions) if d.chances is not None]
    chances = np.array([decisions[i].chances for i in places]).reshape(len(places), BINS, 3)
    hoped = np.array([ece(promise.of(decisions[i].kind).chances.sum(axis=(0, 1))) for i in places])
    return [*found, _calibration(chances, hoped, places, made), _seconds(decisions, limits.false_alarms)]


def _followed(kind: Kind) -> Kind:
    return kind if kind.tried else Kind(1, True, kind.examples)


def _mean(
    name: str,
    values: np.ndarray,
    cut: np.ndarray,
    expected: np.ndarray,
    places: Sequence[int],
    made: Mapping[tuple[str, str], Limit],
) -> Finding:
    """values: as people are told them; cut: as they count."""
    measured, tolerated = cut - expected, SMALLEST[name] / 2
    beyond = measured
    tests = {"page_hinkley": made[name, "page_hinkley"], "window": made[name, "window"]}
    alarms: list[int] = []
    fired = since = None
    start, worst, chance, which, level = 0, 0.0, 1.0, "page_hinkley", 0.0
    hinkley = _river(tests["page_hinkley"].value, tolerated)
    for now in range(len(beyond)):
        hinkley.update(float(beyond[now]))
        if fired is not None:
            recent = beyond[max(since or 0, now + 1 - WINDOW) : now + 1]
            if len(recent) >= WINDOW // 2 and beyond[now + 1 - WINDOW // 2 : now + 1].mean() < tolerated / 2:
                fired, since, start, worst, chance = None, None, now + 1, 0.0, 1.0
                hinkley = _river(tests["page_hinkley"].value, tolerated)
                # Told once. A promise that was a little too good would be told again and again: from here on, what is
                # usual is the promise and all that was seen, the former as sure as WEIGHT decisions.
                beyond = measured - max(0.0, float(measured[: now + 1].sum()) / (WEIGHT + now + 1))
            continue
        statistics = {
            "page_hinkley": hinkley._sum_increase - hinkley._min_increase,
            "window": float(windows(beyond[max(start, now + 1 - WINDOW) : now + 1])[-1]),
        }
        evidence = {test: value / tests[test].value for test, value in statistics.items()}
        test = max(evidence, key=lambda t: evidence[t])
        worst = evidence[test] if now + 1 - start >= LEAST else 0.0
        which, chance = test, tests[test].chance(statistics[test])
        if worst >= 1:
            fired = now
            since = start + _onset(beyond[start : now + 1] - tolerated)
            level = float(values[since : now + 1].mean())
            alarms.append(now)
    recent = slice(max(start, len(values) - WINDOW), None)
    return Finding(
        watch=name,
        value=float(values[recent].mean()) if len(values[recent]) else float("nan"),
        expected=float(expected[recent].mean()) if len(values[recent]) else float("nan"),
        evidence=worst,
        test=which,
        chance=chance,
        decisions=len(values),
        fired=None if fired is None else places[fired],
        since=None if since is None else places[since],
        alarms=tuple(places[a] for a in alarms),
        at_alarm=level,
    )


def _river(threshold: float, delta: float):  # type: ignore[no-untyped-def]
    """river's Page-Hinkley that knows the mean as well as WEIGHT decisions would tell it."""
    from river.drift import PageHinkley

    found = PageHinkley(min_instances=1, delta=delta, threshold=float("inf"), alpha=1.0, mode="up")
    for _ in range(int(WEIGHT)):
        found.update(0.0)
    return found


def _onset(beyond: np.ndarray) -> int:
    """Where the last rise of a cumulative sum begins: the estimate of the change point that belongs to Page-Hinkley."""
    sums = np.concatenate([[0.0], np.cumsum(beyond)])
    return min(int(np.flatnonzero(sums == sums.min())[-1]), len(beyond) - 1)


def _calibration(
    chances: np.ndarray, expected: np.ndarray, places: Sequence[int], made: Mapping[tuple[str, str], Limit]
) -> Finding:
    limit = made["chances", "window"]
    alarms: list[int] = []
    fired = since = None
    start, worst, chance = 0, 0.0, 1.0
    told = peak = limit.value
    for now in range(len(chances)):
        own = chances[max(start, now + 1 - WINDOW) : now + 1]
        statistic = float(sliding_ece(own[None])[0, -1]) if len(own) else -np.inf
        evidence = max(0.0, statistic / told)
        if fired is not None:
            peak = max(peak, statistic)
            if now - fired >= WINDOW and evidence < 0.75:
                fired, since, start, worst, chance = None, None, now + 1, 0.0, 1.0
                told = peak  # only what is worse is told again
            continue
        worst, chance = evidence, limit.chance(statistic)
        if worst >= 1:
            fired, since = now, max(start, now + 1 - WINDOW)
            alarms.append(now)
    recent = chances[max(start, len(chances) - WINDOW) :]
    return Finding(
        watch="chances",
        value=float(ece(recent.sum(axis=0))) if len(recent) else float("nan"),
        expected=float(expected[max(start, len(chances) - WINDOW) :].mean()) if len(recent) else float("nan"),
        evidence=worst,
        test="window",
        chance=chance,
        decisions=len(chances),
        fired=None if fired is None else places[fired],
        since=None if since is None else places[since],
        alarms=tuple(places[a] for a in alarms),
        at_alarm=float(ece(chances[since : (fired or 0) + 1].sum(axis=0))) if since is not None else 0.0,
    )


BEGINNING = 20  # decisions that say how predicted seconds usually stand to measured ones
SECONDS_WINDOW = 10
LEAST_SPREAD = 0.25  # of the logarithm: seconds that agree better than this are luck
MOST = 3.0  # spreads that one decision counts for at most


def _seconds(decisions: Sequence[Decision], false_alarms: float) -> Finding:
    places = [i for i, d in enumerate(decisions) if d.slowness is not None]
    values = np.array([decisions[i].slowness for i in places], dtype=float)
    limit = Limit(_usual_seconds(), false_alarms * SHARES["seconds", "window"])
    told = _away(values[None])[0] if len(values) > BEGINNING else np.zeros(len(values))
    alarms = [i for i in range(len(told)) if told[i] >= limit.value and (i == 0 or told[i - 1] < limit.value)]
    lasts = bool(len(told)) and told[-1] >= 0.75 * limit.value and bool(alarms)
    fired = alarms[-1] if lasts else None
    since = None if fired is None else max(BEGINNING, fired + 1 - SECONDS_WINDOW)
    recent = values[-SECONDS_WINDOW:]
    return Finding(
        watch="seconds",
        value=float(recent.mean()) if len(recent) else float("nan"),
        expected=float(np.median(values[:BEGINNING])) if len(values) else float("nan"),
        evidence=float(told[-1] / limit.value) if len(told) else 0.0,
        test="window",
        chance=limit.chance(float(told[-1])) if len(told) else 1.0,
        decisions=len(values),
        fired=None if fired is None else places[fired],
        since=None if since is None else places[since],
        alarms=tuple(places[a] for a in alarms),
        at_alarm=float(values[since : (fired or 0) + 1].mean()) if since is not None else 0.0,
    )


def _away(values: np.ndarray) -> np.ndarray:
    """(runs, length) -> how far the last SECONDS_WINDOW are from the first BEGINNING, in spreads of the latter (up or
    down); 0 before there are any beyond them."""
    first = values[:, :BEGINNING]
    middle = np.median(first, axis=1, keepdims=True)
    spread = np.maximum(LEAST_SPREAD, 1.4826 * np.median(np.abs(first - middle), axis=1, keepdims=True))
    cut = np.clip((values - middle) / spread, -MOST, MOST)
    cut[:, :BEGINNING] = 0
    sums = np.cumsum(cut, axis=1)
    sums[:, SECONDS_WINDOW:] = sums[:, SECONDS_WINDOW:] - sums[:, :-SECONDS_WINDOW].copy()
    found: np.ndarray = np.abs(sums) / SECONDS_WINDOW
    return found


@lru_cache(maxsize=1)
def _usual_seconds() -> np.ndarray:
    """Of logarithms with heavy tails (Student's t with 4 degrees of freedom) that do not change."""
    drawn = np.random.default_rng(0).standard_t(4, size=(RUNS, HORIZON + BEGINNING))
    return highest(_away(drawn))
