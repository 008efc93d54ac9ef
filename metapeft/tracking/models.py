"""The registry: one registered model per task and backbone, one version per adapter, data only.

A version is a folder of safetensors and JSON with its metadata as tags; nothing is pickled. The alias `champion` says
which version to serve. It moves to a new version only when that one scores no worse, and the first must not be clearly
worse than the untuned backbone; otherwise the new one is `challenger`. The tag `champions` of the registered model
keeps who was champion in what order, for `rollback`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from metapeft.data.task import Task
from metapeft.errors import MetapeftError, UserError, disk
from metapeft.peft.folder import stable
from metapeft.settings import Settings, brief, home
from metapeft.tracking import servers
from metapeft.tracking.client import connect, failures, lock, locked
from metapeft.tracking.decision import advised
from metapeft.training.trial import Trial

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

    from metapeft.tracking.tracker import Json

CHAMPION, CHALLENGER = "champion", "challenger"
HELD_OUT = " of held-out shots"  # ends the metric of a score that is not of a test split
DATA_ONLY = {".safetensors", ".json", ".md", ".txt", ".jinja"}
_HISTORY = "champions"
_SETTLED = "first_alias"  # written last: a version without it was interrupted before it got its alias
_ADVICE = {"recommendation": "id", "meta_model": "model", "known_tasks": "tasks", "known_trials": "trials"}
_KIND = {"metapeft": "adapter"}  # tag of the registered models that are ours


@dataclass(frozen=True)
class Model:
    """A registered adapter. `name`@`version` identifies it; `source` is where MLflow keeps its files."""

    name: str
    version: int
    aliases: tuple[str, ...]
    task: str
    task_version: str
    backbone: str
    method: str
    configuration: dict[str, Any]
    metric: str
    score: float
    standard_error: float
    untuned_score: float | None
    trial: str
    dvc_id: str
    run_id: str
    source: str
    created: int  # milliseconds since 1970, UTC
    expected: dict[str, Any] | None = None  # the recommendation's entry for this configuration
    weights: str = ""  # sha256 of its weights, see `weights_digest`

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Registration:
    """A version, the alias it has ("" for none), and why."""

    model: Model
    alias: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """What people and programs are told of it."""
        return {"model": self.model.name, "version": self.model.version, "alias": self.alias, "reason": self.reason}


def registered_name(task: str, backbone: str) -> str:
    """`task-TASK--BACKBONE`. MLflow forbids "/" and ":"; a name that had to change ends in a hash of the original."""
    plain = f"task-{task}--{backbone}"
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)[:180]
    return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def register(
    client: MlflowClient,
    settings: Settings,
    run_id: str,
    adapter: Path,
    trial: Trial,
    task: Task,
    recommendation: Json | None = None,
    alias: str = CHAMPION,
) -> Registration:
    """Upload an adapter folder as artifacts of the run and make it a version of the task's registered model.

    With alias "champion" the version becomes champion unless the present one scored better (or on another metric), or
    there is none and the untuned backbone scored better by more than a standard error; then it is "challenger". Any
    other alias is simply set. The same weights of the same trial are not registered twice.
    Raises UserError when the folder holds no plain adapter or the trial has no score.
    """
    if trial.score is None:
        raise UserError(
            f"trial {trial.id} ended {trial.status!r} without a score; only a scored trial can be registered"
        )
    _check_folder(adapter)
    name = registered_name(task.name, trial.backbone)
    with failures(settings.tracking), lock("registry"), tempfile.TemporaryDirectory() as place:
        files = Path(place) / "adapter"
        stable(adapter, lambda at: _copy(at, files))  # another process may be replacing the folder
        tags = {**_tags(trial, task, recommendation), "weights": weights_digest(files)}
        same = ("trial", "weights", "score")
        version = next((v for v in _versions(client, name) if all(v.tags.get(key) == tags[key] for key in same)), None)
        if version is not None and _SETTLED in version.tags:
            known = _model(client, version)
            return Registration(known, (*known.aliases, "")[0], f"registered before as version {known.version}")
        if version is None:
            stored = f"adapters/{trial.id}"
            client.log_artifacts(run_id, str(files), stored)
            source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{stored}"
            _ensure_registered(client, name, task, trial.backbone)
            version = client.create_model_version(name, source, run_id, tags)
        reason = "asked for"
        if alias == CHAMPION:
            alias, reason = _decide(trial, task, _by_alias(client, name, CHAMPION))
        if alias == CHAMPION:
            _crown(client, name, int(version.version))
        else:
            client.set_registered_model_alias(name, alias, version.version)
        client.set_model_version_tag(name, version.version, _SETTLED, alias)
        done = Registration(_model(client, client.get_model_version(name, version.version)), alias, reason)
    servers.tell(name)
    return done


def list_models(settings: Settings) -> list[Model]:
    """All registered adapters, by name, newest version first."""
    client = connect(settings.tracking)
    with failures(settings.tracking):
        found = [_model(client, v) for m in _registered(client) for v in _versions(client, m.name)]
    return sorted(found, key=lambda model: (model.name, -model.version))


def promote(settings: Settings, name: str, version: int) -> Model:
    """Make a version the champion, whatever it scored. `name` is a registered name or a task's name."""
    client = connect(settings.tracking)
    with failures(settings.tracking), lock("registry"):
        name = _find(client, name)
        chosen = _version(client, name, str(version))
        _crown(client, name, int(chosen.version))
        model = _model(client, client.get_model_version(name, chosen.version))
    servers.tell(name)
    return model


def rollback(settings: Settings, name: str, of: int | None = None) -> Model:
    """Give the champion alias back to the version that had it before; the champion from then on.

    of: only if that version is still champion. Raises UserError when there was no earlier champion.
    """
    client = connect(settings.tracking)
    with failures(settings.tracking), lock("registry"):
        name = _find(client, name)
        present = _by_alias(client, name, CHAMPION)
        if of is not None and present is not None and int(present.version) != of:
            return _model(client, present)
        history = _history(client, name)
        alive = {int(v.version) for v in _versions(client, name)}
        earlier = history[:-1]
        while earlier and earlier[-1] not in alive:
            earlier.pop()
        if not earlier:
            raise UserError(f"{name} has had no earlier champion to go back to; see `metapeft models list`")
        client.set_registered_model_alias(name, CHAMPION, str(earlier[-1]))
        client.set_registered_model_tag(name, _HISTORY, json.dumps(earlier))
        model = _model(client, client.get_model_version(name, str(earlier[-1])))
    servers.tell(name)
    return model


def resolve(settings: Settings, reference: str) -> tuple[Path, Model]:
    """`[task/]NAME[@ALIAS|@VERSION]` -> (local adapter folder, metadata); the alias is champion when none is given.

    NAME is a registered name or a task's, which may hold an @ too. Files on a server are downloaded once into
    METAPEFT_HOME/models.
    """
    client = connect(settings.tracking)
    whole = reference.removeprefix("task/")
    with failures(settings.tracking):
        names = {name for m in _registered(client) for name in (m.name, m.tags.get("task"))}
        name, _, which = (whole, "", "") if whole in names or "@" not in whole else whole.rpartition("@")
        name = _find(client, name)
        model = _model(client, _version(client, name, which or CHAMPION))
        return _local(client, model), model


def _check_folder(adapter: Path) -> None:
    if not adapter.is_dir():
        raise UserError(f"there is no adapter folder {adapter}; give the folder that training wrote")
    files = [path for path in sorted(adapter.rglob("*")) if path.is_file()]
    for path in files:
        if path.suffix not in DATA_ONLY:
            raise UserError(f"{path} is not plain data; an adapter holds only {', '.join(sorted(DATA_ONLY))} files")
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{adapter} holds no weights (.safetensors); give the folder that training wrote")


def _copy(adapter: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    try:
        shutil.copytree(adapter, to)
    except OSError as error:  # shutil.Error too
        if (reason := disk(error)) is not None:
            raise MetapeftError(f"cannot copy the adapter folder {adapter}: {reason}") from error
        raise UserError(f"cannot copy the adapter folder {adapter} ({brief(error)}); check it and the disk") from error


def weights_digest(adapter: Path) -> str:
    """sha256 of all weights in an adapter folder."""
    digest = hashlib.sha256()
    for path in sorted(adapter.rglob("*.safetensors")):
        digest.update(path.relative_to(adapter).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _ensure_registered(client: MlflowClient, name: str, task: Task, backbone: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, {**_KIND, "task": task.name, "backbone": backbone})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _tags(trial: Trial, task: Task, recommendation: Json | None) -> dict[str, str]:
    assert trial.score is not None
    tags = {
        "task": task.name,
        "task_version": task.version,
        "backbone": trial.backbone,
        "method": trial.method,
        "configuration": json.dumps(trial.configuration),
        "metric": trial.score.metric,
        "score": repr(float(trial.score.value)),
        "standard_error": repr(float(trial.score.standard_error)),
        "examples": str(trial.score.n),
        "untuned_score": repr(float(trial.untuned_score.value)) if trial.untuned_score else "",
        "trial": trial.id,
        "dvc_id": task.dvc_id,
        "form": form(task),
    }
    if recommendation is not None:
        record = recommendation.to_json()
        tags["recommendation_basis"] = record["basis"]
        tags |= {name: str(record[key]) for name, key in _ADVICE.items() if record.get(key) is not None}
        entry, exact = advised(record, trial)
        if entry is not None:
            if exact:  # of another configuration of the method it would be no expectation
                tags["expected"] = json.dumps(entry)
            tags["followed"] = f"rank {entry['rank']}" if exact else "method only"
    return tags


def form(task: Task) -> str:
    """What is asked and what may be answered: tasks of one name that differ in it are not the same task."""
    asked = json.dumps([task.kind, task.template, sorted(task.labels)], ensure_ascii=False)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _decide(trial: Trial, task: Task, present: MlflowVersion | None) -> tuple[str, str]:
    """The alias of a new version, and why. Equal scores count as not worse.

    A score of held-out shots gives way to one of a test split, and to one of more shots: other shots are another test.
    """
    assert trial.score is not None
    score = trial.score
    if present is None:
        untuned = trial.untuned_score.value if trial.untuned_score is not None else -math.inf
        if score.value + score.standard_error < untuned:
            return CHALLENGER, f"scores {score.value:.3f}, the untuned backbone {untuned:.3f}: worse than no adapter"
        weak = score.value < untuned
        return CHAMPION, "no champion before" + (", though it scores below the untuned backbone" if weak else "")
    old = present.tags
    if old.get("form") and old["form"] != form(task):
        return CHALLENGER, f"another task of the same name: its labels or template are not those of {present.version}"
    before, now = (metric.endswith(HELD_OUT) for metric in (old.get("metric", ""), score.metric))
    if before and not now:
        return CHAMPION, f"scored on a test split, version {present.version} on held-out shots alone"
    if before and now and score.n != int(old.get("examples") or 0):
        more = score.n > int(old.get("examples") or 0)
        said = f"learned from {score.n} shots, champion version {present.version} from {old.get('examples')}"
        return (CHAMPION if more else CHALLENGER), said
    if old.get("metric") != score.metric:
        return CHALLENGER, f"scored by {score.metric}, version {present.version} by {old.get('metric')}: not comparable"
    other = "" if old.get("task_version") == task.version else " (on another version of the data)"
    compared = f"scores {score.value:.3f}, champion version {present.version} {float(old['score']):.3f}{other}"
    return (CHAMPION if score.value >= float(old["score"]) else CHALLENGER), compared


def _crown(client: MlflowClient, name: str, version: int) -> None:
    # The tag first: should the process die before the alias is set, `_history` ends at the champion that still is.
    history = _history(client, name)
    if not history or history[-1] != version:
        history.append(version)
    client.set_registered_model_tag(name, _HISTORY, json.dumps(history))
    client.set_registered_model_alias(name, CHAMPION, str(version))
    challenger = _by_alias(client, name, CHALLENGER)
    if challenger is not None and int(challenger.version) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


def _history(client: MlflowClient, name: str) -> list[int]:
    """Versions that were champion, oldest first, ending with the present champion."""
    history = [int(v) for v in json.loads(client.get_registered_model(name).tags.get(_HISTORY, "[]"))]
    present = _by_alias(client, name, CHAMPION)
    if present is None:
        return history
    current = int(present.version)
    if current in history:  # cut what an interrupted promotion or rollback left behind
        return history[: len(history) - history[::-1].index(current)]
    return [*history, current]


def _by_alias(client: MlflowClient, name: str, alias: str) -> MlflowVersion | None:
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else client.get_model_version(name, str(version))


def _registered(client: MlflowClient) -> Iterable[Any]:
    token = None
    while True:
        page = client.search_registered_models("tags.metapeft = 'adapter'", max_results=200, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _versions(client: MlflowClient, name: str) -> list[MlflowVersion]:
    found: list[MlflowVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _find(client: MlflowClient, name: str) -> str:
    """A registered name from itself or from a task's name."""
    models = list(_registered(client))
    hits = [m.name for m in models if m.name == name] or [m.name for m in models if m.tags.get("task") == name]
    if len(hits) == 1:
        return str(hits[0])
    if hits:
        raise UserError(f"task {name} has models for several backbones; choose one of {', '.join(sorted(hits))}")
    known = ", ".join(sorted(m.name for m in models)) or "none yet"
    raise UserError(f"there is no registered model {name!r}; registered: {known}")


def _version(client: MlflowClient, name: str, which: str) -> MlflowVersion:
    versions = {int(v.version): v for v in _versions(client, name)}
    digits = which.removeprefix("v")
    number = int(digits) if digits.isdecimal() and len(digits) < 19 else None  # Python does not read thousands of them
    if number in versions:
        return versions[number]
    found = None if digits.isdecimal() else _by_alias(client, name, which)
    if found is None:
        aliases = ", ".join(sorted(client.get_registered_model(name).aliases)) or "none"
        numbers = ", ".join(map(str, sorted(versions))) or "none"
        raise UserError(
            f"{name} has no version or alias {brief(repr(which), 60)}; versions: {numbers}; aliases: {aliases}"
        )
    return found


def _model(client: MlflowClient, version: MlflowVersion) -> Model:
    tags = version.tags
    aliases = client.get_registered_model(version.name).aliases
    return Model(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(a for a, v in aliases.items() if str(v) == str(version.version))),
        task=tags.get("task", ""),
        task_version=tags.get("task_version", ""),
        backbone=tags.get("backbone", ""),
        method=tags.get("method", ""),
        configuration=json.loads(tags.get("configuration", "{}")),
        metric=tags.get("metric", ""),
        score=float(tags.get("score", "nan")),
        standard_error=float(tags.get("standard_error", "nan")),
        untuned_score=float(tags["untuned_score"]) if tags.get("untuned_score") else None,
        trial=tags.get("trial", ""),
        dvc_id=tags.get("dvc_id", ""),
        run_id=version.run_id or "",
        source=version.source or "",
        created=int(version.creation_timestamp),
        expected=json.loads(tags["expected"]) if tags.get("expected") else None,
        weights=tags.get("weights", ""),
    )


def _local(client: MlflowClient, model: Model) -> Path:
    parsed = urlparse(model.source)
    if parsed.scheme in ("", "file"):
        folder = Path(unquote(parsed.path))
        if not folder.is_dir():
            raise UserError(f"the files of {model.name} version {model.version} are gone from {folder}; train it again")
        return folder
    # Numbers begin again where a model was deleted, and on another server: what was registered is part of the name.
    folder = home() / "models" / model.name / f"{model.version}-{(model.weights or model.run_id)[:16]}"
    if folder.is_dir():
        return folder
    from mlflow.artifacts import download_artifacts

    with locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():  # else another process was first
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
            try:
                where = download_artifacts(
                    run_id=model.run_id,
                    artifact_path=f"adapters/{model.trial}",
                    dst_path=str(temporary),
                    tracking_uri=client.tracking_uri,
                )
                os.rename(where, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder
