"""What has been learned, as a version: the experience and the meta-model in one folder under DVC, and in the registry.

    knowledge/experience.parquet    every trial of one's own
    knowledge/meta/                 all versions of the meta-model, and which one is champion

The folder is a function of what is known: the same knowledge has the same content id.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metapeft.data import versions
from metapeft.errors import UserError
from metapeft.meta import versions as meta_versions
from metapeft.meta.experience import Experience
from metapeft.settings import Settings, home
from metapeft.tracking.client import connect, experiment_id, failures, lock, locked

META_MODEL = "meta-model"  # the registered model
CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class Snapshot:
    """`meta_model`: number of the champion; `registered`: its version in MLflow's registry (the shipped: none)."""

    folder: str
    dvc_id: str
    trials: int
    meta_model: int
    changed: bool
    pushed: int
    registered: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def snapshot(settings: Settings, folder: Path) -> Snapshot:
    """Write the folder, put it under DVC and in the remote, register the meta-model. Repeating changes nothing.

    Raises UserError when the folder is in no DVC repository or holds something else.
    """
    repository = versions.repository(folder.absolute())
    if repository is None:
        raise UserError(f"{folder} is in no DVC repository; run `dvc init` in the project's folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    if folder.exists() and versions.tracked(folder) is None and any(folder.iterdir()):
        raise UserError(f"{folder} holds something that is not this command's; give another folder")
    with locked(repository / ".dvc" / "tmp" / f"metapeft-{folder.name}.lock"):
        before = versions.tracked(folder)
        new = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(new, ignore_errors=True)  # of a killed process
        try:
            new.mkdir(parents=True)
            store = Experience(shipped=None)
            trials = store.export(new / "experience.parquet")
            if (home() / "meta").is_dir():
                keep = shutil.ignore_patterns(".*", "evaluation", "*.lock")
                shutil.copytree(home() / "meta", new / "meta", ignore=keep)
            if not folder.exists() or versions.content_id(new) != versions.content_id(folder):
                if folder.exists():
                    shutil.rmtree(folder)
                os.rename(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        identity = versions.track(folder)
        pushed = versions.push(folder)
        champion = meta_versions.champion().number
        registered = register(settings, identity)
    return Snapshot(str(folder), identity, trials, champion, before != identity, pushed, registered)


def restore(folder: Path, identity: str | None = None) -> dict[str, Any]:
    """Take a snapshot's knowledge over: trials that are missing here, and meta-models where there are none.

    identity: a snapshot's content id (None: what the .dvc file says). Raises UserError when DVC does not have it.
    """
    wanted = identity or versions.tracked(folder)
    if wanted is None:
        raise UserError(f"there is no {folder}.dvc; `git checkout` the project, or give a snapshot's id")
    if not folder.exists() or versions.content_id(folder) != wanted:
        versions.restore(folder, wanted)
    trials = Experience(shipped=None).merge(folder / "experience.parquet")
    models = 0
    if (folder / "meta").is_dir() and not (home() / "meta" / "champion.json").exists():
        # The champion last, and each file whole: a restore that is killed is taken up again.
        for source in sorted((folder / "meta").rglob("*.json"), key=lambda p: p.name == "champion.json"):
            target = home() / "meta" / source.relative_to(folder / "meta")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            shutil.copyfile(source, partial)
            os.replace(partial, target)
            models += source.name != "champion.json"
    return {"trials": trials, "meta_models": models, "dvc_id": wanted}


def register(settings: Settings, dvc_id: str = "") -> int | None:
    """The meta-models in MLflow's registry, one version for each that has none, `champion` where it is champion here.

    The newest other one is `challenger`. Returns the champion's version there; None while the shipped one is champion.
    """
    from mlflow.exceptions import MlflowException

    client = connect(settings.tracking)
    champion = meta_versions.champion().number
    with failures(settings.tracking), lock("registry"):
        try:
            client.create_registered_model(META_MODEL, {"metapeft": "meta-model"})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = {int(v.tags["number"]): v for v in client.search_model_versions(f"name = '{META_MODEL}'")}
        for version in meta_versions.versions():
            if version.number == 0 or version.number in known:
                continue
            facts = {"number": version.number, "tasks": version.tasks, "observations": version.observations}
            tags = {k: str(v) for k, v in facts.items()} | {"made": version.made, "experience_dvc_id": dvc_id}
            tags |= {f"judged.{k}": json.dumps(v) for k, v in version.judged.items()}
            run = client.create_run(
                experiment_id(client, settings.tracking), tags={"kind": META_MODEL, **tags}, run_name=META_MODEL
            )
            run_id = run.info.run_id
            client.log_text(run_id, json.dumps(version.to_json(), indent=2), "meta-model/model.json")
            for name, value in (version.judged.get("challenger") or {}).items():
                if isinstance(value, int | float):
                    client.log_metric(run_id, f"judged.{name}", value)
            client.set_terminated(run_id)
            source = f"{run.info.artifact_uri.rstrip('/')}/meta-model"
            known[version.number] = client.create_model_version(META_MODEL, source, run_id, tags)
        aliases = {CHAMPION: known.get(champion)}
        others = [number for number in known if number != champion]
        aliases[CHALLENGER] = known[max(others)] if others else None
        present = client.get_registered_model(META_MODEL).aliases
        for alias, found in aliases.items():
            if found is not None:
                client.set_registered_model_alias(META_MODEL, alias, found.version)
            elif alias in present:
                client.delete_registered_model_alias(META_MODEL, alias)
        return int(known[champion].version) if champion in known else None
