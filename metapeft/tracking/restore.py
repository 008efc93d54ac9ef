"""From a registered model back to what made it: the code, the parameters and the data, each exactly as it was.

    FOLDER/                the commit of the code, checked out (`git worktree`), where this repository has it
    FOLDER/params.yaml     every setting of the run
    FOLDER/data/…          the task's file, by its content id from where it lay, DVC's cache or its remote
    FOLDER/model/          the adapter

`dvc repro` in the folder then makes the model again; for one that `metapeft adapt` left a warning says how.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metapeft.data import catalog, versions
from metapeft.errors import MetapeftError, UserError
from metapeft.settings import Settings
from metapeft.tracking.client import connect, failures
from metapeft.tracking.models import Model, resolve, weights_digest


@dataclass(frozen=True)
class Restored:
    """`commit` is "" where the code was not under Git; `code` and `data` say where they came from."""

    model: str
    version: int
    folder: str
    commit: str
    code: str
    task: str
    task_version: str
    dvc_id: str
    data: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def restore(settings: Settings, reference: str, folder: Path) -> Restored:
    """Restore what `NAME[@ALIAS|@VERSION]` was made of into a new folder.

    Raises UserError when the folder is not empty, the run has lost its settings, or nobody has the data any more.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a folder that does not exist")
    adapter, model = resolve(settings, reference)
    if model.weights and weights_digest(adapter) != model.weights:
        raise UserError(f"the weights of {model.name} version {model.version} in {adapter} are not those registered")
    client = connect(settings.tracking)
    with failures(settings.tracking), tempfile.TemporaryDirectory() as place:
        run = client.get_run(model.run_id)
        if all(found.path != "settings.json" for found in client.list_artifacts(model.run_id)):
            raise UserError(f"run {model.run_id} of {model.name} has lost its settings (settings.json); train it again")
        try:
            wanted = json.loads(Path(client.download_artifacts(model.run_id, "settings.json", place)).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"run {model.run_id} of {model.name} has lost its settings ({error})") from error
    tags = run.data.tags
    warnings = []
    if tags.get("git_dirty") == "true":
        warnings.append("the code had changes that were in no commit; they are not here")
    shots = tags.get("shots")
    commit = tags.get("git_commit", "")
    code = _check_out(commit, folder)
    try:
        wanted["task"], origin = _data(model, wanted["task"], folder)
        wanted["tracking"]["uri"] = None  # of the machine that runs it
        if shots is not None:
            warnings.append(_again(wanted["task"], shots, tags.get("strategy", "")))
        _check_data(model, wanted, folder, None if shots is None else int(shots))
        import yaml

        (folder / "params.yaml").write_text(yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True), "utf-8")
        shutil.copytree(adapter, folder / "model")
    except BaseException:
        _remove(folder)
        raise
    return Restored(
        *(model.name, model.version, str(folder), commit, code),
        *(wanted["task"], model.task_version, model.dvc_id, origin, tuple(warnings)),
    )


def _again(task: str, shots: str, strategy: str) -> str:
    """How to make again what `metapeft adapt` left."""
    library = " and the library and starts of then in METAPEFT_HOME"
    needed = library if strategy.startswith(("nearest", "mix", "reptile")) else ""
    return (
        f"it was learned from a few shots: not `dvc repro` but `metapeft adapt {task} --shots {shots} --strategy"
        f" '{strategy}'` in the folder makes it again, with this params.yaml{needed}"
    )


def _check_out(commit: str, folder: Path) -> str:
    """The code's version in `folder`; without it an empty folder, and what to do."""
    if commit and _git("cat-file", "-e", f"{commit}^{{commit}}").returncode == 0:
        done = _git("worktree", "add", "--detach", "--force", str(folder.absolute()), commit)
        if done.returncode == 0:
            return f"commit {commit[:12]}, checked out"
        said = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
        raise MetapeftError(f"git could not check out {commit}: {said[-1]}")
    folder.mkdir(parents=True, exist_ok=True)
    if not commit:
        return "not known: the run was made outside of Git"
    return f"commit {commit} is not in this repository; fetch it, then: git worktree add ANOTHER-FOLDER {commit[:12]}"


def _remove(folder: Path) -> None:
    if _git("worktree", "remove", "--force", str(folder.absolute())).returncode:
        shutil.rmtree(folder, ignore_errors=True)


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:  # no Git on this machine, or one that hangs
        return subprocess.CompletedProcess(words, 127, "", str(error))


def _data(model: Model, task: str, folder: Path) -> tuple[str, str]:
    """The task's name within the folder, and where the data came from."""
    if catalog.find(task) is not None:  # pinned by hash, so its name says enough
        found = catalog.fetch(task)
        if versions.content_id(found) != model.dvc_id:
            raise UserError(f"the catalog's {task} is another version now; it was {model.dvc_id}")
        return task, "catalog"
    if not model.dvc_id:
        return task, "not versioned: read from its source again"
    source = Path(task).expanduser()
    place = folder / "data" / source.name
    if source.exists() and versions.content_id(source) == model.dvc_id:
        place.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        if not place.exists():
            copy(source, place)
        return f"data/{source.name}", f"{source}, unchanged"
    root = versions.repository(source.absolute()) or versions.repository(Path.cwd() / "here")
    if root is None:
        raise UserError(f"{source} has changed since (it was {model.dvc_id}), and there is no DVC repository to ask")
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    versions.fetch(model.dvc_id, place, root)
    return f"data/{source.name}", f"DVC, {root}"


def _check_data(model: Model, wanted: dict[str, Any], folder: Path, shots: int | None) -> None:
    """The rows, split (or drawn, where it learned from shots) as they were, have the version that the model was trained
    on."""
    from metapeft.data import load_task
    from metapeft.data.shots import load_shots
    from metapeft.settings import DataSettings

    name, data = wanted["task"], DataSettings(**wanted["data"])
    if name.startswith("data/"):
        name = str(folder / name)
    task = load_task(name, data) if shots is None else load_shots(name, shots, data, wanted["seed"])[0]
    if task.version != model.task_version:
        raise UserError(
            f"the data's rows are another version ({task.version}, the model was trained on {model.task_version}):"
            " this metapeft reads or splits them differently; use the code of that time"
        )
