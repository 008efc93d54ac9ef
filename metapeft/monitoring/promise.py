"""How good the champion's advice was on families of tasks left out: the level that outcomes are compared with.

Every judged task (`metapeft.meta.evaluate`) says what was predicted and measured for all configurations tried there. A
decision is followed by fewer trials than that, and regret depends on how many: `Promise.of` therefore looks at each
judged task as if it had been followed in the same way, several times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metapeft.meta.evaluate import LEAST_JUDGED, Judged, judge
from metapeft.meta.evidence import Observation
from metapeft.meta.experience import SHIPPED
from metapeft.meta.fitting import fit
from metapeft.meta.forecast import CLOSE
from metapeft.meta.model import Model
from metapeft.meta.versions import Version
from metapeft.monitoring.outcomes import Kind, binned, disorder
from metapeft.profiling import cache
from metapeft.progress import say
from metapeft.settings import home

REPEATS = 8  # ways in which a judged task is followed, per kind
CAP = 0.95  # quantile of regret above which more regret says no more: one terrible choice is no trend
LEAST_CAP = 0.15
TESTS = 300  # examples that a judged task was scored on


@dataclass(frozen=True)
class Followed:
    """Judged tasks as if followed in one way: (tasks, REPEATS) each; `chances` (tasks, REPEATS, BINS, 3)."""

    regret: np.ndarray
    outside: np.ndarray
    disorder: np.ndarray  # nan where there is no order
    chances: np.ndarray


@dataclass
class Promise:
    """judged: one entry per task and budget, each told without anything known of its family."""

    judged: list[Judged]
    _made: dict[Kind, Followed] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return len({j.task for j in self.judged}) >= LEAST_JUDGED

    @property
    def families(self) -> list[str]:
        return [j.family for j in self.judged]

    @property
    def cap(self) -> float:
        return max(LEAST_CAP, float(np.quantile([max(j.seen) - _first(j) for j in self.judged], CAP)))

    def of(self, kind: Kind) -> Followed:
        """What is to be expected of decisions that are followed so."""
        if kind not in self._made:
            self._made[kind] = self._as_followed(kind)
        return self._made[kind]

    def _as_followed(self, kind: Kind) -> Followed:
        random = np.random.default_rng([kind.tried, kind.near, kind.examples])
        rows: list[list[tuple[float, float, float, np.ndarray]]] = []
        for j in self.judged:
            order = np.argsort(-np.asarray(j.mean), kind="stable")
            others = order[1:]
            some = []
            for _ in range(REPEATS):
                wanted = max(0, kind.tried - 1)
                chosen = others[:wanted] if kind.near else random.permutation(others)[:wanted]
                tried = np.concatenate([order[:1], chosen])
                seen = _measured_again(np.asarray(j.seen)[tried], kind.examples, random)
                within = (seen >= seen.max() - CLOSE).astype(float)
                chances = np.asarray(j.p_within)[tried]
                outside = 1 - float(np.mean(np.asarray(j.inside["0.9"], dtype=float)[tried]))
                bins = binned(zip(chances, within, strict=True))
                wrong = disorder(np.asarray(j.mean)[tried], seen)
                some.append((float(seen.max() - seen[0]), outside, np.nan if wrong is None else wrong, bins))
            rows.append(some)
        parts = [np.array([[row[i] for row in some] for some in rows], dtype=float) for i in range(4)]
        return Followed(np.minimum(parts[0], self.cap), parts[1], parts[2], parts[3])


def _first(j: Judged) -> float:
    return float(j.seen[int(np.argmax(j.mean))])


def _measured_again(seen: np.ndarray, examples: int, random: np.random.Generator) -> np.ndarray:
    """The same scores with the sampling error that a smaller split adds."""
    more = max(0.0, 1 / max(1, examples) - 1 / TESTS)
    spread = np.sqrt(np.clip(seen * (1 - seen), 0.01, None) * more)
    return np.clip(seen + spread * random.standard_normal(len(seen)), 0, 1)


def promised(version: Version, observations: Sequence[Observation], fitted: Callable[..., Model] = fit) -> Promise:
    """Of a version of the meta-model, as far as the observations that it was fitted to tell (all, for one that was
    fitted to nothing). Ships with the version that does; kept in METAPEFT_HOME/monitoring until version or observations
    change; minutes where not."""
    seen = set(version.seen)
    used = [o for o in observations if o.id in seen] if seen else list(observations)
    path = home() / "monitoring" / "promise.json"
    for known in (path, SHIPPED / "promise.json"):
        record = cache.read(known)
        if record is not None and record.get("of") == _identity(version, used):
            try:
                return Promise([Judged(**j) for j in record["judged"]])
            except (KeyError, TypeError):
                pass  # of another version of metapeft: judged again
    say("monitor: judging the meta-model on tasks left out, once per version: minutes, with much experience")
    judged = _judged(version, used, fitted)
    cache.write(path, {"of": _identity(version, used), "judged": [_plain(asdict(j)) for j in judged]})
    return Promise(judged)


def ship(version: Version, observations: Sequence[Observation], path: Path) -> None:
    """Write down what is promised of a version that ships, to five digits: nobody has to judge it again."""
    judged = [_plain(asdict(j), 5) for j in _judged(version, observations, fit)]
    text = json.dumps({"of": _identity(version, observations), "judged": judged}, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """`python -m metapeft.monitoring.promise`, after `python -m metapeft.meta.ship`; minutes."""
    from metapeft.meta.ship import shipped
    from metapeft.meta.versions import shipped as version

    found = version()
    ship(found, shipped().observations(found.model.remaining), SHIPPED / "promise.json")
    say(f"what is promised of the meta-model that ships: {SHIPPED / 'promise.json'}")


def _judged(version: Version, used: Sequence[Observation], fitted: Callable[..., Model]) -> list[Judged]:
    """A version that was fitted is judged as what fitting makes of the other families, the beliefs as they are."""
    return judge(used, fitted if version.seen else lambda known: version.model, rival=())


def _identity(version: Version, used: Sequence[Observation]) -> str:
    parts = [version.number, version.model.to_json(), sorted((o.id, round(o.score, 6)) for o in used)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any, digits: int = 17) -> Any:
    """JSON's own numbers, without NaN."""
    if isinstance(value, dict):
        return {str(k): _plain(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, digits) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item(), digits)
    if isinstance(value, float):
        return round(value, digits) if np.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
