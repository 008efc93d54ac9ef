"""Is a degradation noticed, how soon, and how often is the alarm false? Replayed histories with a known truth.

    python benchmarks/monitoring.py [--quick] [--json FILE]

The real selector (metapeft.meta) is fitted to synthetic experience (benchmarks/synthetic.py: profiles tell 90 % of what
matters, 60 % of the table is run) and recommends for one new task after another; every task is of a family never seen.
What it recommends and the trials that follow are joined and watched by metapeft.monitoring as `metapeft monitor` does.

Without a change: thousands of decisions, alarms counted. With one: 60 decisions as before, then the change. Delay: from
the change to the first alarm of any watch, in decisions; harm: the true regret after the change less that before, by
the truth that no watch sees. Decisions are followed by sweeps of 8 trials ("sweeps"), or by a training of the first
choice with a shadow trial of the runner-up in three of ten ("shadow").

    new families    tasks outside the known ones, whom other methods suit
    profiles        two features of every incoming profile change their sign, one its unit
    profiles mixed  every incoming task gets another task's profile: nothing to see in their distribution, and nothing
                    to learn from
    profiles kept   the same of what is kept as the tasks' profiles; measured again, they are right
    metric          a meta-model that goes by the wrong features
    shrunk          a meta-model that believes in no difference between methods or configurations
    device          another kind of device, which trials name: best learning rates are a third of what they were,
                    trainings take 1.7 times as long

Retraining (`metapeft meta train`): fitted anew to the experience with the trials of all decisions so far and of 20
grown tasks, once at the alarm and once more 40 decisions later; the true regret of 100 decisions after each. Where
profiles are measured again they are right from then on, as the alert asks for. Beside it what a selector without
profiles could reach after the change at best: always the configuration that is best on average.

Real experience (METAPEFT_HOME and what is shipped), where 8 tasks can be judged: its judged tasks in random order, as
ranked by the champion, and by nobody (at random).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.histories import CPU, Device, Selector, Step, scaled, shadowed, swept, true_regret
from benchmarks.synthetic import Nature, world

BEFORE, AFTER, RETRAINED = 60, 120, 100
HARM = 0.03
MANY = 2000  # tasks that tell which configuration is best on average
SOON = 30
KNOWN = 49
TRANSFER, FILLED = 0.9, 0.6
SLOWER = 1.7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one world, fewer histories")
    parser.add_argument("--json", type=Path, help="written after every scenario, so that a run that is cut is not lost")
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="this degradation (may be repeated)")
    options = parser.parse_args()
    worlds, histories, length = (1, 3, 1500) if options.quick else (3, 6, 4000)
    began = time.perf_counter()
    still: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    mended: list[dict[str, Any]] = []
    for seed in range(worlds):
        house = House.built(seed, refit=not options.quick)
        say(f"world {seed}: fitted and judged after {time.perf_counter() - began:.0f} s")
        still += unchanged(house, length)
        say(f"world {seed}: unchanged histories after {time.perf_counter() - began:.0f} s")
        for scenario in options.only or SCENARIOS:
            rows = [degraded(house, scenario, run) for run in range(histories)]
            changed += rows
            mended.append(retrained(house, scenario, rows[0]))
            delays = [row["delay"] for row in rows]
            say(f"world {seed}: {scenario}: delays {delays} after {time.perf_counter() - began:.0f} s")
            write(options.json, began, still, changed, mended, {}, False)
    observed = real()
    targets = judged(still, changed, mended)
    print(table(still, changed, mended, observed))
    for target in targets:
        value = "not known" if target["value"] is None else f"{target['value']:.3g}"
        print(f"{'met' if target['met'] else 'NOT MET'}: {target['name']}: {value} (target {target['target']})")
    write(options.json, began, still, changed, mended, observed, True)
    return 0 if all(t["met"] for t in targets) else 1


def write(
    path: Path | None,
    began: float,
    still: list[dict[str, Any]],
    changed: list[dict[str, Any]],
    mended: list[dict[str, Any]],
    observed: dict[str, Any],
    complete: bool,
) -> None:
    from metapeft.runtime import describe

    if path is None:
        return
    record = {
        "machine": describe(),
        "command": " ".join(["python", "benchmarks/monitoring.py", *sys.argv[1:]]),
        "complete": complete,
        "seconds": round(time.perf_counter() - began),
        "rows": changed,
        "unchanged": still,
        "retrained": mended,
        "real": observed,
        "targets": judged(still, changed, mended),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


@dataclass
class House:
    """One world: the selector fitted to its experience, what is promised of it, and tasks that nobody knows."""

    seed: int
    selector: Selector
    promise: Any
    profiles: Any
    nature: Nature
    limits: dict[Any, Any]

    @classmethod
    def built(cls, seed: int, refit: bool) -> House:
        from metapeft.meta.evaluate import judge
        from metapeft.meta.fitting import fit
        from metapeft.monitoring.drift import Profiles
        from metapeft.monitoring.promise import Promise

        made = world(KNOWN, seed, TRANSFER, filled=FILLED)
        observations = made.observations()
        model = fit(observations)
        promise = Promise(judge(observations, fit if refit else lambda known: model, ()))
        tasks = {o.task.version: o.task for o in observations}.values()
        profiles = Profiles(np.array([scaled(t.features) for t in tasks]), tuple(t.family for t in tasks))
        random = np.random.default_rng([seed, 1])
        assert made.nature is not None
        nature = replace(made.nature, kinds={f"new{i}": random.normal(size=4) for i in range(300)})
        return cls(seed, Selector(model, observations, made), promise, profiles, nature, {})

    def watched(self, steps: Sequence[Step], again: bool = False) -> list[tuple[int, str]]:
        """Alarms as (index of the decision, watch), in order. again: each look measures the last task's profile again,
        which gives the task's own."""
        from metapeft.monitoring import drift
        from metapeft.monitoring.outcomes import joined
        from metapeft.monitoring.watches import FALSE_ALARMS, Limits, watch

        decisions = joined([s.entry for s in steps], [t for s in steps for t in s.trials])
        mixture = frozenset(d.kind for d in decisions)
        if mixture not in self.limits:
            self.limits[mixture] = Limits(self.promise, decisions)
        findings = watch(decisions, self.promise, self.limits[mixture])
        vectors = np.array([s.vector for s in steps])
        findings.append(drift.watch(self.profiles, vectors, range(len(steps)), FALSE_ALARMS)[0])
        alarms = [(alarm, f.watch) for f in findings for alarm in f.alarms]
        if again and (wrong := [place for place, step in enumerate(steps) if remeasured(step)]):
            alarms.append((wrong[0], "remeasured"))
        return sorted(alarms)


def remeasured(step: Step) -> dict[str, float]:
    from metapeft.monitoring.drift import scaled
    from metapeft.monitoring.remeasure import differences
    from metapeft.profiling.profiles import SCALES

    kept, own = (dict(zip(SCALES, scaled(f), strict=True)) for f in (step.features, step.own))
    return differences(kept, own)


FOLLOWED: dict[str, Callable[..., Any]] = {"sweeps": swept(8), "shadow": shadowed(0.3)}


def unchanged(house: House, length: int) -> list[dict[str, Any]]:
    rows = []
    for followed, follow in FOLLOWED.items():
        random = np.random.default_rng([house.seed, 2, len(followed)])
        steps = house.selector.history(random, house.nature, length, list(house.nature.kinds), follow)
        alarms = house.watched(steps)
        rows.append(
            {
                "world": house.seed,
                "followed": followed,
                "decisions": length,
                "alarms": len(alarms),
                "by_watch": dict(Counter(name for _, name in alarms)),
                "per_thousand": 1000 * len(alarms) / length,
                "true_regret": true_regret(steps)[0],
            }
        )
    return rows


@dataclass
class Change:
    """What is different after a change. kept: what `corrupt` changes is kept, not what tasks measure like."""

    selector: Selector
    nature: Nature
    corrupt: Callable[..., Any] | None = None
    device: Device = CPU
    kept: bool = False


def new_families(house: House, random: np.random.Generator) -> Change:
    kinds = {f"far{i}": random.normal(size=4) + np.array([2.5, 0.0, 0.0, 1.0]) for i in range(60)}
    return Change(house.selector, replace(house.nature, kinds=kinds, suits=-0.5 * house.nature.suits))


def wrong_units(house: House, random: np.random.Generator) -> Change:
    def corrupt(features: dict[str, float], random: np.random.Generator) -> dict[str, float]:
        features["zero_shot_loss"] *= 1 / np.log(2)
        features["label_entropy"] = 1.4 - features["label_entropy"]
        features["word_length"] = 9.0 - features["word_length"]
        return features

    return Change(house.selector, house.nature, corrupt)


def mixed_up(house: House, random: np.random.Generator) -> Change:
    kinds = list(house.nature.kinds.values())

    def corrupt(features: dict[str, float], random: np.random.Generator) -> dict[str, float]:
        other = house.nature.task(random, "other", kinds[int(random.integers(len(kinds)))]).features
        own = ("zero_shot_score", "zero_shot_standard_error")
        return other | {name: features[name] for name in own}

    return Change(house.selector, house.nature, corrupt)


def wrongly_kept(house: House, random: np.random.Generator) -> Change:
    return replace(mixed_up(house, random), kept=True)


def wrong_metric(house: House, random: np.random.Generator) -> Change:
    from metapeft.meta.embedding import Metric

    weights = np.array(house.selector.model.metric.weights)
    order = np.roll(np.argsort(weights), len(weights) // 2)  # what mattered most matters least
    moved = np.empty_like(weights)
    moved[order] = np.sort(weights)
    model = replace(house.selector.model, metric=Metric(tuple(moved)), reach=1.0, length=0.5)
    return Change(Selector(model, house.selector.observations, house.selector.world), house.nature)


def shrunk(house: House, random: np.random.Generator) -> Change:
    names = ("method", "configuration", "similar_method", "similar_configuration")
    old = house.selector.model.deviations
    model = replace(house.selector.model, deviations=old | {name: 0.02 * old[name] for name in names})
    return Change(Selector(model, house.selector.observations, house.selector.world), house.nature)


def other_device(house: House, random: np.random.Generator) -> Change:
    return Change(house.selector, replace(house.nature, rates=-1.2), device=Device("metal", SLOWER))


SCENARIOS: dict[str, Callable[[House, np.random.Generator], Change]] = {
    "new families": new_families,
    "profiles": wrong_units,
    "profiles mixed": mixed_up,
    "metric": wrong_metric,
    "shrunk": shrunk,
    "device": other_device,
    "profiles kept": wrongly_kept,
}
LOST = ("profiles mixed",)  # nothing can be learned from profiles any more, whatever is fitted to them


def degraded(house: House, scenario: str, run: int, followed: str = "sweeps") -> dict[str, Any]:
    """One history with a change after BEFORE decisions."""
    number = list(SCENARIOS).index(scenario)
    random = np.random.default_rng([house.seed, 3, number, run])
    follow = FOLLOWED[followed]
    healthy = house.selector.history(random, house.nature, BEFORE, list(house.nature.kinds), follow)
    change = SCENARIOS[scenario](house, random)
    worse = change.selector.history(
        random, change.nature, AFTER, list(change.nature.kinds), follow, change.corrupt, BEFORE, change.device
    )
    alarms = house.watched([*healthy, *worse], change.kept)
    found = [(place - BEFORE + 1, name) for place, name in alarms if place >= BEFORE]
    first: dict[str, int] = {}
    for delay, name in found:
        first.setdefault(name, delay)
    before, after = true_regret(healthy), true_regret(worse)
    return {
        "world": house.seed,
        "scenario": scenario,
        "run": run,
        "followed": followed,
        "false_alarms": sum(place < BEFORE for place, _ in alarms),
        "delay": found[0][0] if found else None,
        "watch": found[0][1] if found else None,
        "first": first,
        "true_regret": {"before": before, "after": after},
    }


def retrained(house: House, scenario: str, row: dict[str, Any]) -> dict[str, Any]:
    """Twice: at the alarm, and 40 decisions later."""
    from metapeft.meta.fitting import fit

    number = list(SCENARIOS).index(scenario)
    random = np.random.default_rng([house.seed, 4, number])
    change = SCENARIOS[scenario](house, random)
    follow, fresh = FOLLOWED["sweeps"], list(change.nature.kinds)

    def later(selector: Selector, length: int, start: int, by: Callable[..., Any] = follow) -> list[Step]:
        return selector.history(random, change.nature, length, fresh, by, change.corrupt, start, change.device)

    former = house.selector.history(random, house.nature, RETRAINED, list(house.nature.kinds), follow, start=5000)
    steps = later(change.selector, row["delay"] or AFTER, 6000)
    steps += later(change.selector, 20, 7000, swept(12))  # grown: more configurations of fewer tasks
    if change.kept:
        steps = [replace(step, features=step.own) for step in steps]
        change.corrupt = None
    observations = house.selector.learned(steps)
    regrets = []
    for again in range(2):
        selector = Selector(fit(observations), observations, house.selector.world, number=2 + again)
        regrets.append(true_regret(later(selector, RETRAINED, 10_000 + 1000 * again)))
        steps += later(selector, 40, 20_000 + 1000 * again)
        observations = house.selector.learned(steps)
    return {
        "world": house.seed,
        "scenario": scenario,
        "tasks": len(steps) - 80,
        "former": true_regret(former),
        "worse": row["true_regret"]["after"],
        "retrained": regrets,
        "single_best": single_best(change.nature, random),
    }


def single_best(nature: Nature, random: np.random.Generator) -> float:
    """True regret of always taking the configuration that is best on average, in hindsight."""
    kinds = list(nature.kinds.values())
    truths = np.array([nature.task(random, "", kinds[int(random.integers(len(kinds)))]).truth for _ in range(MANY)])
    return float((truths.max(axis=1) - truths[:, truths.mean(axis=0).argmax()]).mean())


def real() -> dict[str, Any]:
    """Judged tasks of the real experience, as the champion ranks them and as nobody does."""
    from metapeft.meta import versions
    from metapeft.meta.knowledge import knowledge
    from metapeft.monitoring.promise import promised

    champion = versions.champion()
    promise = promised(champion, knowledge().observations(champion.model.remaining))
    tasks = len({j.task for j in promise.judged})
    if not promise:
        return {"tasks": tasks, "enough": False}
    random = np.random.default_rng(0)
    own, guessed = (
        [stream(promise, random, 1500, False)],
        [stream(promise, random, AFTER, True) for _ in range(10)],
    )
    regrets = [[d.regret for d in one] for one in (own[0], guessed[0])]
    delays = [(min((a for f in findings(promise, one) for a in f.alarms), default=None)) for one in guessed]
    return {
        "tasks": tasks,
        "enough": True,
        "alarms_per_thousand": sum(len(f.alarms) for f in findings(promise, own[0])) / 1.5,
        "harm": float(np.mean(regrets[1]) - np.mean(regrets[0])),
        "delays": [None if d is None else d + 1 for d in delays],
    }


def stream(promise: Any, random: np.random.Generator, length: int, guess: bool) -> list[Any]:
    """Decisions about randomly drawn judged tasks; guess: by a ranking that means nothing."""
    from metapeft.meta.forecast import CLOSE
    from metapeft.monitoring.outcomes import Decision, Kind, binned, disorder

    found = []
    for number in range(length):
        j = promise.judged[int(random.integers(len(promise.judged)))]
        mean, seen, within = (np.asarray(v, dtype=float) for v in (j.mean, j.seen, j.p_within))
        if guess:
            mean = random.permutation(mean)
        order = np.argsort(-mean, kind="stable")
        tried = np.concatenate([order[:1], random.permutation(order[1:])[:5]])
        got = seen[tried]
        happened = (got >= got.max() - CLOSE).astype(float)
        found.append(
            Decision(
                f"{number}", "", j.task, j.version, "", j.family, 0, Kind(len(tried)), float(got.max() - got[0]),
                1 - float(np.mean(np.asarray(j.inside["0.9"], dtype=float)[tried])),
                disorder(mean[tried], got), binned(zip(within[tried], happened, strict=True)),
            )
        )  # fmt: skip
    return found


def findings(promise: Any, decisions: Sequence[Any]) -> list[Any]:
    from metapeft.monitoring.watches import Limits, watch

    return watch(decisions, promise, Limits(promise, decisions))


def harm(rows: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([r["true_regret"]["after"][0] - r["true_regret"]["before"][0] for r in rows]))


def judged(
    still: Sequence[dict[str, Any]], changed: Sequence[dict[str, Any]], mended: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A degradation counts where its harm, over all histories of a scenario in a world, is HARM or more."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in changed:
        groups.setdefault((row["world"], row["scenario"]), []).append(row)
    grave = [row for rows in groups.values() if harm(rows) >= HARM for row in rows]
    soon = [row["delay"] is not None and row["delay"] <= SOON for row in grave]
    decisions = sum(row["decisions"] for row in still)
    false = 1000 * sum(row["alarms"] for row in still) / decisions
    back, best = [], []
    for row in mended:
        (former, e), (now, f) = row["former"], row["retrained"][-1]
        if row["scenario"] in LOST:
            best.append(now - row["single_best"] <= max(0.01, 2 * f))
        else:
            back.append(now - former <= max(0.01, 2 * (e**2 + f**2) ** 0.5))
    return [
        {
            "name": f"degradations of {100 * HARM:.0f} points or more found within {SOON} decisions, share",
            "value": float(np.mean(soon)) if soon else None,
            "target": "1",
            "met": bool(soon) and all(soon),
        },
        {
            "name": f"false alarms per 1,000 decisions ({decisions} decisions)",
            "value": false,
            "target": "<= 1",
            "met": false <= 1,
        },
        {
            "name": f"scenarios whose regret is back at its former level after retraining ({len(back)}), share",
            "value": float(np.mean(back)) if back else None,
            "target": "1",
            "met": bool(back) and all(back),
        },
        {
            "name": f"scenarios without any use of profiles ({len(best)}) whose regret is what is possible then, share",
            "value": float(np.mean(best)) if best else None,
            "target": "1",
            "met": bool(best) and all(best),
        },
    ]


def table(
    still: Sequence[dict[str, Any]],
    changed: Sequence[dict[str, Any]],
    mended: Sequence[dict[str, Any]],
    observed: dict[str, Any],
) -> str:
    lines = [
        "| degradation | harm | median delay | worst | within 30 | first seen by |"
        " regret before, worse, refitted, refitted again | single best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for scenario in SCENARIOS:
        rows = [r for r in changed if r["scenario"] == scenario]
        if not rows:
            continue
        delays = [r["delay"] if r["delay"] is not None else np.inf for r in rows]
        first = Counter(r["watch"] for r in rows if r["watch"]).most_common(2)
        again = [m for m in mended if m["scenario"] == scenario]
        stages = [np.mean([100 * v[0] for v in values]) for values in (
            [m["former"] for m in again], [m["worse"] for m in again],
            [m["retrained"][0] for m in again], [m["retrained"][1] for m in again],
        )]  # fmt: skip
        worst = max(delays)
        lines.append(
            f"| {scenario} | {100 * harm(rows):.1f} | {np.median(delays):.0f} |"
            f" {'never' if worst == np.inf else f'{worst:.0f}'} | {sum(d <= SOON for d in delays)} of {len(rows)} |"
            f" {', '.join(name for name, _ in first)} | {', '.join(f'{s:.1f}' for s in stages)} |"
            f" {100 * np.mean([m['single_best'] for m in again]):.1f} |"
        )
    lines.append("")
    for followed in FOLLOWED:
        rows = [r for r in still if r["followed"] == followed]
        total, count = sum(r["decisions"] for r in rows), sum(r["alarms"] for r in rows)
        which = sum((Counter(r["by_watch"]) for r in rows), Counter())
        lines.append(f"without a change, {followed}: {count} alarms in {total} decisions {dict(which)}")
    if observed["enough"]:
        lines.append(
            f"real experience ({observed['tasks']} judged tasks): {observed['alarms_per_thousand']:.2f} alarms per"
            f" 1,000 as ranked; ranked at random (harm {100 * observed['harm']:.1f}) delays {observed['delays']}"
        )
    else:
        lines.append(f"real experience: {observed['tasks']} tasks can be judged, too few")
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
