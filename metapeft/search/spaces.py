"""What may be searched: one declared space per method, narrowed by the user, and its translation to Optuna.

A configuration is a flat dict (docs/architecture.md). Every name below is a field of the method's configuration or of
the trainer's; `steps`, the budget, may be searched too when the user asks for it. Inside Optuna a parameter is called
`method.name`: the methods do not share ranges, and a parameter exists only when its method is chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.errors import UserError
from metapeft.peft.base import METHODS
from metapeft.settings import brief, read_yaml
from metapeft.training.configuration import full

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `log` searches their logarithm."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Choices:
    """Some values. `ordered` ones (sizes) are searched by position, so that neighbours count as similar."""

    values: tuple[Any, ...]
    ordered: bool = False


Domain = Range | Choices


@dataclass(frozen=True)
class Space:
    """Method -> name -> domain. A name with one value is fixed."""

    methods: dict[str, dict[str, Domain]]

    def to_json(self) -> dict[str, dict[str, Any]]:
        return {m: {name: asdict(domain) for name, domain in names.items()} for m, names in self.methods.items()}


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_TARGETS = Choices(((), ATTENTION, ("q_proj", "v_proj")))  # (): every linear layer
_LAYERS = Choices((5, 10, 20, 0), ordered=True)  # the top ones of 30; 0: all of them
_TOKENS = Range(4, 40, log=True, integer=True)
_TRAINING: dict[str, Domain] = {"batch_size": Choices((4, 8, 16), ordered=True), "warmup": Range(0.0, 0.2)}
_SPACES: dict[str, dict[str, Domain]] = {
    "lora": {
        "learning_rate": Range(1e-4, 5e-3, log=True),
        "rank": Choices((2, 4, 8, 16, 32), ordered=True),
        "alpha": Choices((8.0, 16.0, 32.0), ordered=True),
        "dropout": Range(0.0, 0.2),
        "targets": _TARGETS,
        "layers": _LAYERS,
    },
    "adalora": {
        "learning_rate": Range(5e-4, 2e-2, log=True),
        "initial_rank": Choices((8, 12, 16), ordered=True),
        "target_rank": Choices((2, 4, 8), ordered=True),
        "alpha": Choices((16.0, 32.0, 64.0), ordered=True),
        "dropout": Range(0.0, 0.2),
        "targets": _TARGETS,
        "layers": _LAYERS,
        "initial_fraction": Range(0.05, 0.3),
        "final_fraction": Range(0.1, 0.5),
    },
    "prompt": {
        "learning_rate": Range(1e-3, 1e-1, log=True),
        "tokens": _TOKENS,
        "initialisation": Choices(("text", "vocabulary", "random")),
    },
    "prefix": {
        "learning_rate": Range(1e-3, 1e-1, log=True),
        "tokens": _TOKENS,
        "projection": Choices((0, 256), ordered=True),
        "initialisation": Choices(("text", "random")),
    },
    "p_tuning": {
        "learning_rate": Range(2e-4, 2e-2, log=True),
        "tokens": _TOKENS,
        "encoder": Choices(("mlp", "lstm")),
        "width": Choices((64, 128, 256), ordered=True),
    },
}


def defaults(method: str) -> dict[str, Any]:
    """The method's default configuration, every name written out. Raises UserError on an unknown method."""
    return full({"method": method})


def space(
    methods: Sequence[str] | None = None,
    narrow: Mapping[str, Any] | None = None,
    *,
    depth: int | None = None,
    modules: Collection[str] | None = None,
) -> Space:
    """The joint space over `methods` (None: all), narrowed by the user.

    narrow: name -> a value (fixed), a list of choices, or {"low", "high", optionally "log"}. A plain name applies to
    every method that has it (at least one must), `lora.rank`, or `rank` in a section `lora`, to one method, where it
    goes before the plain one; `method` chooses among the methods. A hyperparameter that is not searched by default may
    be named too.
    depth, modules: number of layers of the backbone and names of its linear layers, which the default choices follow.
    Raises UserError naming what is wrong.
    """
    given = _flat(narrow or {})
    chosen = list(dict.fromkeys(methods or METHODS))
    wanted = given.pop("method", chosen)
    wanted = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    for method in (*chosen, *wanted):
        if method not in METHODS:
            raise UserError(f"unknown method {brief(repr(method), 60)} to search; choose from {', '.join(METHODS)}")
    chosen = [method for method in chosen if method in wanted]
    if not chosen:
        raise UserError(f"space.method leaves nothing to search: `methods` does not name {', '.join(map(str, wanted))}")

    joint = {method: _fit(_SPACES[method] | _TRAINING, depth, modules) for method in chosen}
    known = {method: {*defaults(method), "steps"} - {"method"} for method in METHODS}
    for key, value in sorted(given.items(), key=lambda item: "." in item[0]):  # what is said of one method comes last
        owner, _, name = key.rpartition(".")
        if name not in known.get(owner, set().union(*known.values())) or owner not in ("", *METHODS):
            choices = sorted(known.get(owner) or set().union(*(known[method] for method in chosen)))
            raise UserError(f"space.{brief(key, 60)} is no hyperparameter; choose from {', '.join(choices)}")
        if not owner and not any(name in known[method] for method in chosen):
            having = [method for method in METHODS if name in known[method]]
            raise UserError(
                f"space.{name} is no hyperparameter of {' or '.join(chosen)}; {' and '.join(having)}"
                f" {'has' if len(having) == 1 else 'have'} it: leave it out, or search {' or '.join(having)} too"
            )
        for method in chosen:
            if owner in ("", method) and name in known[method]:
                joint[method][name] = _narrowed(f"space.{key}", method, name, value, joint[method].get(name))
    return Space(joint)


def read(path: Path) -> dict[str, Any]:
    """What narrows a space (see `space`), from a YAML or JSON file. Raises UserError where it holds no such thing."""
    values = read_yaml(path, "space file")  # JSON is YAML
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} must map hyperparameters to values, lists or ranges, for example rank: [4, 8]")
    return _flat(values)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """A method's section becomes dotted names."""
    return {
        f"{key}.{name}" if isinstance(value, Mapping) and key in METHODS else key: inner
        for key, value in values.items()
        for name, inner in (value.items() if isinstance(value, Mapping) and key in METHODS else [("", value)])
    }


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """One configuration from an Optuna trial (asked, or enqueued with `encode`)."""
    methods = list(space.methods)
    method = trial.suggest_categorical("method", methods) if len(methods) > 1 else methods[0]
    configuration: dict[str, Any] = {"method": method}
    for name, domain in space.methods[method].items():
        configuration[name] = _suggested(trial, f"{method}.{name}", domain)
    return _settled(configuration)


def project(configuration: Mapping[str, Any], space: Space) -> dict[str, Any] | None:
    """The nearest configuration inside the space, or None where its method is not searched.

    Missing names take the method's default; numbers are clipped, or moved to the nearest choice. Names that the space
    does not search keep their value.
    """
    method = configuration.get("method")
    if method not in space.methods:
        return None
    result = dict(configuration)
    usual = defaults(method)
    for name, domain in space.methods[method].items():
        value = result.get(name, usual.get(name))
        if isinstance(domain, Range):
            result[name] = _inside(domain, domain.low if value is None else value)
        else:
            result[name] = _plain(domain.values[_position(domain, value)])
    return _settled(result)


def encode(configuration: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """The Optuna parameters for which `suggest` returns this configuration, which must come from `project`."""
    method = configuration["method"]
    parameters: dict[str, Any] = {"method": method} if len(space.methods) > 1 else {}
    for name, domain in space.methods[method].items():
        if isinstance(domain, Range):
            value = configuration[name]
        else:
            position = _position(domain, configuration[name])
            value = position if domain.ordered else _label(domain.values[position])
        if not _single(domain):
            parameters[f"{method}.{name}"] = value
    return parameters


def _settled(configuration: dict[str, Any]) -> dict[str, Any]:
    """Rules between hyperparameters: what has no effect takes one value, so that equal trainings look equal."""
    if configuration.get("projection"):
        configuration["initialisation"] = "random"  # a projected prefix cannot start from a text
    if "initial_rank" in configuration and "target_rank" in configuration:
        configuration["target_rank"] = min(configuration["target_rank"], configuration["initial_rank"])
    return configuration


def _suggested(trial: optuna.Trial, key: str, domain: Domain) -> Any:
    if isinstance(domain, Range):
        if domain.integer:
            return trial.suggest_int(key, round(domain.low), round(domain.high), log=domain.log)
        return _inside(domain, trial.suggest_float(key, domain.low, domain.high, log=domain.log))
    if _single(domain):
        return _plain(domain.values[0])
    if domain.ordered:
        return _plain(domain.values[trial.suggest_int(key, 0, len(domain.values) - 1)])
    labels = {_label(value): value for value in domain.values}
    return _plain(labels[trial.suggest_categorical(key, list(labels))])


def _inside(domain: Range, value: float) -> float:
    """The value in the range, with three digits: what a person would type, and no search needs more."""
    value = round(value) if domain.integer else float(f"{value:.3g}")
    return min(max(value, domain.low), domain.high)


def _single(domain: Domain) -> bool:
    return isinstance(domain, Choices) and len(domain.values) == 1


def _position(domain: Choices, value: Any) -> int:
    """Where a value is among the choices: itself, else the nearest number, else the first choice."""
    value = tuple(value) if isinstance(value, list) else value
    if value in domain.values:
        return domain.values.index(value)
    if _number(value) and all(_number(choice) for choice in domain.values):
        return min(range(len(domain.values)), key=lambda index: abs(domain.values[index] - value))
    return 0


def _label(value: Any) -> Any:
    """Optuna's categories are scalars: anything else is written as JSON."""
    return value if isinstance(value, bool | int | float | str) or value is None else json.dumps(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fit(domains: dict[str, Domain], depth: int | None, modules: Collection[str] | None) -> dict[str, Domain]:
    """For a backbone: the top sixth, third and two thirds of its layers, and only linear layers that it has."""
    if depth is not None and "layers" in domains:
        counts = {max(1, round(depth * share)) for share in (1 / 6, 1 / 3, 2 / 3)} - {depth}
        domains["layers"] = Choices((*sorted(counts), 0), ordered=True)
    if modules is not None and "targets" in domains:
        domains["targets"] = Choices(tuple(names for names in _TARGETS.values if set(names) <= set(modules)))
    return domains


def _narrowed(where: str, method: str, name: str, wanted: Any, declared: Domain | None) -> Domain:
    """What the user wrote, as a domain; every value is checked as the method's or the trainer's own."""
    usual = defaults(method).get(name, 1)  # 1: steps
    if isinstance(wanted, Mapping) and not isinstance(usual, Mapping):
        return _range(where, method, name, wanted, declared)
    values = wanted if isinstance(wanted, list | tuple) else [wanted]
    if isinstance(usual, list) and not any(isinstance(value, list | tuple) for value in values):
        values = [values]  # `targets: [q_proj, v_proj]` is one value
    if not values:
        raise UserError(f"{where}: the list of choices is empty; give at least one value")
    checked = [_checked(where, method, name, value) for value in values]
    unique = [value for index, value in enumerate(checked) if value not in checked[:index]]
    if name == "layers":  # 0 means all: the largest
        unique.sort(key=lambda n: n or math.inf)
    elif all(_number(value) for value in unique):
        unique.sort()
    return Choices(tuple(tuple(v) if isinstance(v, list) else v for v in unique), ordered=all(map(_number, unique)))


def _range(where: str, method: str, name: str, wanted: Mapping[str, Any], declared: Domain | None) -> Domain:
    if not {"low", "high"} <= set(wanted) <= {"low", "high", "log"}:
        raise UserError(
            f"{where}: a range is {{low: …, high: …}}, with log: true if wanted; not {brief(dict(wanted), 60)}"
        )
    low, high = (_checked(where, method, name, wanted[end]) for end in ("low", "high"))
    if not _number(low):
        raise UserError(f"{where}: {brief(repr(low), 60)} is not a number, so it has no range; give a list of choices")
    log = bool(wanted.get("log", declared.log if isinstance(declared, Range) else False))
    if low > high or (log and low <= 0):
        raise UserError(f"{where}: low={low} must not exceed high={high}, and a log range starts above 0")
    if low == high:
        return Choices((low,), ordered=True)
    return Range(low, high, log, integer=isinstance(low, int) and isinstance(high, int))


def _checked(where: str, method: str, name: str, value: Any) -> Any:
    """The value as its dataclass takes it ("1e-3", as YAML reads it, becomes a number). Raises UserError."""
    try:
        if name == "steps":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"steps={brief(repr(value), 60)} must be a whole number of at least 1")
            return value
        result = full({"method": method, name: value})[name]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if isinstance(result, float) and not math.isfinite(result):
        raise UserError(f"{where}: {brief(repr(value), 60)} is not a finite number")
    return result
