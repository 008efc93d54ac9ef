"""The meta-model: one linear Gaussian model of gains over (task, configuration, budget).

    gain = belief + overall + method + configuration + budget                        what holds on every task
         + device                                                                    what one kind of device has alone
         + task, from its profile, from similar tasks                                the task's own level
         + task's spread x (method + configuration, from similar tasks and its own)  what suits this task
         + seed + test sampling                                                      noise

Each term is a zero-mean Gaussian with a variance that is fitted to the experience (penalised marginal likelihood,
Rasmussen and Williams 2006, section 5.4), starting at the beliefs of `metapeft.meta.prior`. Conditioning on trials
(eq. 2.23-2.24) takes each task's level out and shrinks every effect towards the portfolio. `reach` says how far
similar tasks teach: it is chosen by leaving tasks out; at 0 a new task gets what is best on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from metapeft.meta import prior
from metapeft.meta.embedding import Metric, plain
from metapeft.meta.evidence import FEATURES, Configuration, Known, Observation, families, key
from metapeft.meta.unfinished import Remaining

MOST = 600  # observations that variances are fitted to
STEPS = 30  # of the optimizer
FREEDOM = 0.7  # standard deviation of a log standard deviation around its belief
REACHED = {"similar_method": "task_method", "similar_configuration": "task_configuration"}
LEVEL_FEATURES = (
    "hint",
    "labels",
    "classification",
    "completion_tokens_mean",
    "zero_shot_loss",
    "zero_shot_score",
    "probe_accuracy",
    "majority_share",
    "label_entropy",
    "train_examples",
)
_LEVEL = [FEATURES.index(name) for name in LEVEL_FEATURES]


@dataclass(frozen=True)
class Model:
    """Everything that is fitted. A pure value: the evidence it is applied to is given to `condition`."""

    deviations: dict[str, float] = field(default_factory=lambda: prior.DEVIATIONS | {"device": 0.0})
    metric: Metric = field(default_factory=plain)
    reach: float = 0.0
    length: float = 1.0  # of the similarity kernel, in the metric's distances
    level_scale: float = 1.0  # factors by which uncertainty is too small, found on tasks left out: of a task's level,
    choice_scale: float = 1.0  # and of how configurations differ on it
    within: tuple[float, float] = (0.0, 1.0)  # intercept and slope that P(within 1 %) needed there, in log odds
    remaining: Remaining = field(default_factory=Remaining)  # what a learning curve that broke off leaves open

    def variance(self, name: str) -> float:
        """Of a term; what similar tasks may not teach (1 - reach) is the task's own."""
        found = self.deviations[name] ** 2
        if name in REACHED:
            return self.reach * found
        return found + sum((1 - self.reach) * self.deviations[n] ** 2 for n, own in REACHED.items() if own == name)

    def to_json(self) -> dict[str, Any]:
        return {
            "deviations": self.deviations,
            "metric": self.metric.to_json(),
            "reach": self.reach,
            "length": self.length,
            "level_scale": self.level_scale,
            "choice_scale": self.choice_scale,
            "within": list(self.within),
            "remaining": self.remaining.to_json(),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Model:
        """Raises KeyError, TypeError or ValueError for a record that is none."""
        numbers = {name: float(record[name]) for name in ("reach", "length", "level_scale", "choice_scale")}
        known = {"device": 0.0} | record["deviations"]  # versions of before devices were told apart have none
        deviations = {name: float(known[name]) for name in prior.DEVIATIONS}
        intercept, slope = record.get("within", (0.0, 1.0))  # versions of before it was fitted have none
        return cls(
            deviations=deviations,
            metric=Metric.from_json(record["metric"]),
            remaining=Remaining.from_json(record["remaining"]),
            within=(float(intercept), float(slope)),
            **numbers,
        )


@dataclass(frozen=True)
class Places:
    """Points of the model's input space: every one a (task, configuration, steps, device), kept as indices of unique
    ones."""

    tasks: tuple[Known, ...]
    configurations: tuple[Configuration, ...]
    task: np.ndarray  # (n,) of int
    configuration: np.ndarray
    doublings: np.ndarray  # (n,) log2 of the steps
    device: np.ndarray  # (n,) of str

    @classmethod
    def of(cls, points: Sequence[tuple[Known, str, Configuration, int, str]]) -> Places:
        """From (task, key of the configuration, configuration, steps, device)."""
        tasks: dict[Known, int] = {}
        configurations: dict[str, tuple[int, Configuration]] = {}
        where, what = [], []
        for known, name, configuration, _, _ in points:
            where.append(tasks.setdefault(known, len(tasks)))
            what.append(configurations.setdefault(name, (len(configurations), configuration))[0])
        return cls(
            tuple(tasks),
            tuple(c for _, c in configurations.values()),
            np.array(where, dtype=int),
            np.array(what, dtype=int),
            np.log2([max(1, steps) for _, _, _, steps, _ in points]),
            np.array([device for *_, device in points], dtype=object),
        )

    @classmethod
    def seen(cls, observations: Sequence[Observation]) -> Places:
        return cls.of([(o.task, o.key, o.configuration, o.steps, o.device) for o in observations])


def terms(model: Model, left: Places, right: Places) -> dict[str, np.ndarray]:
    """Covariance of every term between two lists of points, (left, right), in units of the term's variance."""

    def by_task(values: np.ndarray) -> np.ndarray:
        return values[np.ix_(left.task, right.task)]

    def by_configuration(values: np.ndarray) -> np.ndarray:
        return values[np.ix_(left.configuration, right.configuration)]

    backbone = by_task(_shared_backbone(left.tasks, right.tasks))
    similar = model.metric.similarity(left.tasks, right.tasks, model.length)
    same = by_task(_same_task(left.tasks, right.tasks, similar))
    near = by_task(similar) * backbone
    linear = by_task(_linear(left.tasks, right.tasks)) * backbone
    method, alike = (by_configuration(values) for values in prior.alike(left.configurations, right.configurations))
    device = np.equal.outer(left.device, right.device)
    # A path that wanders by one step per doubling, from the smallest budget there may be.
    walk = np.minimum.outer(left.doublings, right.doublings)
    return {
        "overall": backbone,
        "method": backbone * method,
        "configuration": backbone * alike,
        "device": device * backbone * (1 + method + alike) / 3,
        "task": same,
        "task_linear": linear,
        "task_similar": near,
        "task_method": same * method,
        "task_configuration": same * alike,
        "similar_method": near * method,
        "similar_configuration": near * alike,
        "doubling": walk * (backbone + backbone * method + same + same * alike) / 4,
    }


def together(model: Model, matrices: dict[str, np.ndarray]) -> np.ndarray:
    """The covariance of gains, without noise, from that of the terms."""
    return np.sum([model.variance(name) * matrix for name, matrix in matrices.items()], axis=0)


def noise(model: Model, observations: Sequence[Observation]) -> np.ndarray:
    """Variance of each observation that does not come from task and configuration, (n,)."""
    seed = model.deviations["seed"] ** 2 / np.array([o.repeats for o in observations])
    return seed + (model.deviations["sampling"] * np.array([o.error for o in observations])) ** 2


def mean(places: Places) -> np.ndarray:
    """The gain that is believed without evidence, (n,)."""
    configurations = np.array([prior.expected(c) for c in places.configurations])
    levels = np.array([prior.expected_level(t) for t in places.tasks])
    return configurations[places.configuration] + levels[places.task]


class Conditioned:
    """A model together with evidence: predicts the gains of configurations on a task."""

    def __init__(
        self, model: Model, observations: Sequence[Observation], matrices: dict[str, np.ndarray] | None = None
    ):
        """matrices: the observations' `terms`, where they are known already."""
        from scipy.linalg import cholesky

        self.model = model
        self.places = Places.seen(observations)
        if observations:
            known = together(model, matrices or terms(model, self.places, self.places))
            known[np.diag_indices_from(known)] += noise(model, observations)
            self._root = cholesky(known, lower=True, overwrite_a=True, check_finite=False)
            surprise = np.array([o.gain for o in observations]) - mean(self.places)
            self._surprise = _solve(self._root, surprise)

    def predict(
        self, task: Known, candidates: Sequence[Configuration], steps: int, device: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean (n,) and covariance (n, n) of the candidates' gains. Candidates hold all hyperparameters."""
        return self.at(Places.of([(task, key(c), c, steps, device) for c in candidates]))

    def at(
        self, own: Places, inside: dict[str, np.ndarray] | None = None, across: dict[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for any points. inside, across: the points' `terms` with themselves and the evidence with them."""
        believed = mean(own)
        uncertain = together(self.model, inside or terms(self.model, own, own))
        if not len(self.places.task):
            return believed, uncertain
        shared = _solve(self._root, together(self.model, across or terms(self.model, self.places, own)))
        return believed + shared.T @ self._surprise, uncertain - shared.T @ shared


def fit_deviations(observations: Sequence[Observation], start: Model) -> Model:
    """The model with the deviations that the observations make most probable, given the beliefs about them.

    Where all were made on one device nothing can be said of others: then that term is left out.
    """
    from scipy.linalg import cholesky
    from scipy.optimize import minimize

    chosen = sample(observations)
    if not chosen:
        return start
    places = Places.seen(chosen)
    components = terms(start, places, places)
    if len(set(places.device)) < 2:
        del components["device"]
    components["seed"] = np.diag([1 / o.repeats for o in chosen])
    components["sampling"] = np.diag([o.error**2 for o in chosen])
    names = list(components)
    surprise = np.array([o.gain for o in chosen]) - mean(places)
    centre = np.log([prior.DEVIATIONS[name] for name in names])

    def objective(logs: np.ndarray) -> tuple[float, np.ndarray]:
        variances = np.exp(2 * logs)
        total = np.zeros((len(chosen), len(chosen)))
        for v, name in zip(variances, names, strict=True):
            total += v * components[name]
        total[np.diag_indices_from(total)] += 1e-6
        root = cholesky(total, lower=True, overwrite_a=True, check_finite=False)
        inverse = _inverse(root)
        weights = inverse @ surprise
        value = 0.5 * surprise @ weights + np.log(np.diag(root)).sum()
        pull = inverse - np.outer(weights, weights)
        slope = np.array([v * np.vdot(pull, components[n]) for v, n in zip(variances, names, strict=True)])
        away = (logs - centre) / FREEDOM
        return float(value + 0.5 * away @ away), slope + away / FREEDOM

    first = np.log([start.deviations[n] or prior.DEVIATIONS[n] for n in names])
    found = minimize(objective, first, jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    fitted = {n: float(v) for n, v in zip(names, np.exp(found.x), strict=True)}
    return replace(start, deviations={"device": 0.0} | fitted)


def sample(observations: Sequence[Observation]) -> list[Observation]:
    """At most MOST of them, drawn at random, always the same ones."""
    if len(observations) <= MOST:
        return list(observations)
    order = np.random.default_rng(0).permutation(len(observations))
    return [observations[i] for i in sorted(order[:MOST])]


def _solve(root: np.ndarray, right: np.ndarray) -> np.ndarray:
    """root^-1 right, for a lower triangular root."""
    from scipy.linalg import solve_triangular

    found: np.ndarray = solve_triangular(root, right, lower=True, check_finite=False)
    return found


def _inverse(root: np.ndarray) -> np.ndarray:
    """Of the matrix whose Cholesky factor is given."""
    from scipy.linalg import lapack

    found, _ = lapack.dpotri(root, lower=1)
    return found + np.tril(found, -1).T


def _shared_backbone(left: Sequence[Known], right: Sequence[Known]) -> np.ndarray:
    same = np.equal.outer(np.array([t.backbone for t in left], object), np.array([t.backbone for t in right], object))
    return np.where(same, 1.0, prior.OTHER_BACKBONE)


def _same_task(left: Sequence[Known], right: Sequence[Known], similar: np.ndarray) -> np.ndarray:
    """1 for a task with itself, less for a sample of it of another size, or another backbone; 0 for other tasks.

    Outside of the catalog a name is a file's and proves little: there what has that name counts as the same task as far
    as it is `similar`, the very rows on another backbone too (a product of covariances is one; exceptions are not).
    Of what was never profiled the very rows are alike.
    """
    versions = np.equal.outer(np.array([t.version for t in left], object), np.array([t.version for t in right], object))
    rows = similar + versions * np.outer([t.features is None for t in left], [t.features is None for t in right])
    catalog = np.array([t.name in families() for t in left], dtype=bool)[:, None]
    names = np.equal.outer(np.array([t.name for t in left], object), np.array([t.name for t in right], object))
    sizes = [np.log2([max(1, t.train_examples) for t in side]) for side in (left, right)]
    alike = prior.OTHER_SIZE ** np.abs(np.subtract.outer(*sizes))
    return names * np.where(catalog, 1.0, rows) * alike * _shared_backbone(left, right)


def _linear(left: Sequence[Known], right: Sequence[Known]) -> np.ndarray:
    rows = [np.array([t.vector[_LEVEL] for t in side]).reshape(-1, len(_LEVEL)) for side in (left, right)]
    return rows[0] @ rows[1].T / rows[0].shape[1]
