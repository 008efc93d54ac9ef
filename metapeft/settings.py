"""Typed settings: params.yaml, then what a command was given.

`METAPEFT_HOME` (default `.metapeft` in the working folder) holds caches, the MLflow database, adapters and experience.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from metapeft.errors import UserError

DEFAULT_BACKBONE = "smollm2-135m-instruct"
Prefer = Literal["accuracy", "balanced", "speed", "memory"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def given(cls, values: Any) -> Any:
        """A name with nothing after it, such as a section whose lines are all comments, leaves the default."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name not in cls.model_fields}


class DataSettings(Section):
    """What is read from a task and how it is split (see `metapeft.data.load_task`)."""

    max_train: int = Field(1000, ge=1, description="training examples used at most")
    max_validation: int = Field(150, ge=1)
    max_test: int = Field(300, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    metric: Literal["accuracy", "macro_f1", "exact_match"] | None = Field(None, description="None: the field's default")
    template: str | None = Field(None, description="prompt template with {text} and {labels}; None: the default")


class RecommendSettings(Section):
    prefer: Prefer = "balanced"
    max_seconds: float | None = Field(None, gt=0)
    max_memory_mb: float | None = Field(None, gt=0)


class SweepSettings(Section):
    trials: int = Field(8, ge=1)
    max_seconds: float | None = Field(None, gt=0, description="for all trials together")
    max_trial_seconds: float | None = Field(None, gt=0, description="longest trial; None: recommend.max_seconds")
    max_memory_mb: float | None = Field(None, gt=0, description="of a trial; None: recommend.max_memory_mb")
    steps: int = Field(40, ge=1, description="optimizer steps per trial")
    methods: list[str] | None = Field(None, description="None: all five")
    space: dict[str, Any] = Field(default_factory=dict, description="hyperparameter -> fixed value or list of choices")
    workers: int = Field(1, ge=1, description="processes that train at the same time")
    repeats: int | None = Field(
        None, ge=0, description="of the trials, how many repeat the best with other seeds; None: a quarter, from 8 on"
    )
    warm: bool = Field(True, description="start with what is recommended and what was best on the most similar tasks")
    stop: bool = Field(True, description="end hopeless trials early, once enough learning curves are known")
    sampler: Literal["tpe", "gp", "nsga2", "random"] = Field("tpe", description="gp needs the extra metapeft[gp]")
    adapters: bool = Field(False, description="small adapters are an objective too")


class TrainSettings(Section):
    steps: int = Field(120, ge=1, description="optimizer steps")
    method: str | None = Field(None, description="None: the best of the sweep, else the first recommended")
    configuration: dict[str, Any] = Field(default_factory=dict, description="overrides of the chosen hyperparameters")
    switch: bool = Field(False, description="the method may be exchanged on the way, within the same seconds")
    switches: int = Field(2, ge=0, description="exchanges at most")
    confidence: float = Field(0.62, ge=0.5, lt=1, description="that an exchange is better, before it is made")
    tolerance: float = Field(0.02, ge=0, le=1, description="score that an exchange may cost before it is undone")
    looks: int = Field(4, ge=2, description="evaluations, at which decisions are made")


class MonitorSettings(Section):
    """What `metapeft monitor` watches (see `metapeft.monitoring`)."""

    false_alarms: float = Field(
        1.0, ge=0.1, le=100, description="per 1,000 decisions, of all tests of the advice together"
    )
    shadow: int = Field(0, ge=0, description="trials of the runner-up that a run may make, to know what was missed")
    remeasure: int = Field(1, ge=0, description="profiles that a run measures again; all at hand where one differs")


class TrackingSettings(Section):
    uri: str | None = Field(None, description="None: SQLite in METAPEFT_HOME")
    experiment: str = "metapeft"


class Settings(Section):
    """All settings of one run. `load_settings` builds it."""

    task: str = "sms_spam"
    backbone: str = DEFAULT_BACKBONE
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataSettings = DataSettings()
    recommend: RecommendSettings = RecommendSettings()
    sweep: SweepSettings = SweepSettings()
    train: TrainSettings = TrainSettings()
    monitor: MonitorSettings = MonitorSettings()
    tracking: TrackingSettings = TrackingSettings()


MEMORY = "METAPEFT_MEMORY_MB"  # memory that a process may use; unset: what is free


def home() -> Path:
    """The folder for caches, the MLflow database, adapters and experience (absolute, not created)."""
    return Path(os.environ.get("METAPEFT_HOME") or ".metapeft").expanduser().absolute()


def allowed_memory_mb() -> float:
    """METAPEFT_MEMORY_MB, infinite where it is not set. Raises UserError where it is no number."""
    text = os.environ.get(MEMORY) or "inf"
    try:
        allowed = float(text)
    except ValueError:
        allowed = math.nan
    if not allowed > 0:
        raise UserError(f"{MEMORY}={text[:40]} is no number of MiB; give one, such as 4096, or unset it")
    return allowed


def load_settings(params: Path | None = None, **overrides: Any) -> Settings:
    """Settings from a params.yaml (when given, it must exist) with `overrides` on top (nested dicts are merged).

    Raises UserError naming the first wrong key.
    """
    values: dict[str, Any] = {}
    if params is not None:
        values = read_yaml(params, "params file") or {}
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise UserError(f"{params} must hold a mapping of settings; write NAME: VALUE on each line")
    try:
        return Settings.model_validate(merge(values, overrides))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"])
        problem = unknown(first["loc"]) if first["type"] == "extra_forbidden" else brief(first["msg"].lower())
        source = "the given options" if params is None or _given(overrides, first["loc"]) else params
        raise UserError(f"setting {brief(where)}: {problem} (in {source})") from error


def _given(values: Any, place: tuple[int | str, ...]) -> bool:
    """Whether nested mappings hold this place, or end above it."""
    for part in place:
        if not isinstance(values, dict):
            return True
        if values.get(part) is None:  # as in `merge`
            return False
        values = values[part]
    return True


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML (or JSON) file of the user's holds: strings, numbers, lists and mappings. Raises UserError."""
    import yaml

    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        # Nearly all JSON is YAML; not where it is indented by tabs.
        values = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path} ({error.strerror}); give an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not text; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError) as error:
        # ValueError: 2024-13-45, which looks like a date; a number of over 4,300 digits. AttributeError: odd merges.
        raise UserError(f"the {what} {path} is not valid {kind} ({brief(str(error))}); fix the file") from error
    if not _plain(values):
        raise UserError(
            f"the {what} {path} holds a date or another thing that is no text, number, list or mapping (or too many of"
            " them); put quotes around it"
        )
    return values


def user_path(text: str | Path) -> Path:
    """The path that a user's text names, `~` replaced. Raises UserError for what no file can be called."""
    import errno

    try:
        path = Path(text).expanduser()
        os.lstat(path)
        str(path).encode()  # records and answers are UTF-8, and hold this name
    except (ValueError, RuntimeError) as error:  # a zero byte; half of a surrogate pair, or not UTF-8; ~NOBODY
        raise UserError(f"{brief(text, 60)!r} is no name of a file ({error}); check the name") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{brief(text, 60)!r} is longer than a file's name can be; check the name") from error
    return path


def _plain(values: Any, most: int = 100_000) -> bool:
    """Whether it is what JSON can hold, and no more of it than a person writes: YAML's aliases multiply."""
    waiting, seen = [values], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > most:
            return False
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif not (value is None or isinstance(value, bool | int | float | str)):
            return False
    return True


def brief(text: object, most: int = 200) -> str:
    """What somebody else wrote, for a message: one line, not too long, and nothing that a terminal cannot show."""
    line = " ".join(str(text).split())
    shown = line if len(line) <= most else f"{line[:most]}…"
    return shown.encode("utf-8", "backslashreplace").decode()


def shown(url: str) -> str:
    """An address, or a text with addresses in it, that may be printed: without passwords."""
    return re.sub(r"([?&]password=)[^&\s]*", r"\1…", re.sub(r"(://[^:/@\s]*):[^/\s]*@", r"\1@", url))


def unknown(place: tuple[int | str, ...]) -> str:
    """What to say of a setting that does not exist."""
    import difflib

    section: Any = Settings
    for part in place[:-1]:
        section = section.model_fields[part].annotation
    close = difflib.get_close_matches(str(place[-1])[:60], section.model_fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(section.model_fields)}"
    return f"there is no such setting; {hint}"


NULL = object()  # an override that says null; None says that nothing was given


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`; None values in `over` mean "not given", NULL ones null."""
    result = dict(base)
    for key, value in over.items():
        if value is None:
            continue
        value = None if value is NULL else value
        if isinstance(value, dict):
            result[key] = merge(result[key] if isinstance(result.get(key), dict) else {}, value)
        else:
            result[key] = value
    return result
