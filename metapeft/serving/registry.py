"""What may be served: the registry's versions for this backbone, and which of them each alias means here.

`refresh` looks at the registry. Where an alias means another version than before, that version is deployed: its files
are fetched and compared with the sha256 that the registry holds, it is loaded next to what is served, a smoke test runs
through it, and only then does the alias change. What fails stays out, requests go on with the version before, and a
failed champion's place is given back in the registry. A version that could not be looked at, because the store, the
files or the disk are away, is tried again until they are back. Requests hold the version that they began with.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metapeft.errors import MetapeftError, UserError
from metapeft.peft import checkpoints
from metapeft.peft.saved import Saved
from metapeft.serving.engine import Unavailable
from metapeft.serving.generate import Logits, Row, whole, write
from metapeft.settings import Settings, brief, home
from metapeft.tracking import models
from metapeft.tracking.models import CHAMPION, Model

if TYPE_CHECKING:
    from metapeft.serving.engine import Engine

PROBE = "Hello"
OUTCOMES = ("deployed", "refused", "postponed")
HISTORY = 200  # deployments that are remembered
RETRY_SECONDS = 2.0  # until the first new try of what could not be looked at; then twice as long each time
LONGEST_SECONDS = 86_400.0  # between two looks at the registry


class UnknownModel(UserError):
    """No such model is served."""


@dataclass(frozen=True)
class Version:
    """A registered adapter whose files are here and are what was registered."""

    model: Model
    folder: Path
    form: dict[str, Any]  # how its task asks: name, kind, labels, template ({} in folders that do not say)
    virtual: int = 0  # tokens that it puts before every prompt

    @property
    def key(self) -> str:
        return f"{self.model.name}@{self.model.version}"


@dataclass(frozen=True)
class Deployment:
    """What became of a version that an alias was to mean. outcome: one of OUTCOMES."""

    time: str
    model: str
    task: str
    alias: str
    version: int
    before: int | None
    outcome: str
    reason: str
    seconds: float


class Registry:
    """`resolve` may be called from any thread; one thread refreshes, when told or every `seconds`."""

    def __init__(self, engine: Engine, settings: Settings, seconds: float = 60.0):
        self.engine, self.settings = engine, settings
        self.seconds = min(LONGEST_SECONDS, seconds)  # in this order also for what is no number
        self.ready = threading.Event()
        self.looked = False  # whether one ever succeeded
        self.problem = ""  # why the last look at the registry failed
        self.models: tuple[Model, ...] = ()
        self.served: dict[tuple[str, str], int] = {}  # (name, alias) -> version
        self.deployments: deque[Deployment] = deque(_remembered(), maxlen=HISTORY)
        self._versions: dict[str, Version] = {}
        self._failed: dict[tuple[str, str], Registered] = {}
        self._deployed: dict[tuple[str, str], Registered] = {}
        self._postponed: set[tuple[str, str]] = set()  # of the last look: what could not be looked at
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="metapeft-registry", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join(10)

    def notice(self, name: str | None = None) -> None:
        """Look at the registry now; a version of `name` (a registered name, or an id as requests have it) that failed
        before gets another chance."""
        if name is None:
            self._failed = {}
        else:
            task = name.removeprefix("task/")
            meant = {name} | (self._named(task) or self._named(task.rpartition("@")[0]))
            self._failed = {key: version for key, version in self._failed.items() if key[0] not in meant}
        self._wake.set()

    def ids(self) -> list[tuple[str, Model]]:
        """What `model` may be: `task/NAME@ALIAS` for what is deployed, `task/NAME@VERSION` for all."""
        found = []
        for model in self.models:
            aliases = self.aliases(model)
            found += [(f"task/{model.task}@{which}", model) for which in [*aliases, str(model.version)]]
        return found

    def aliases(self, model: Model) -> list[str]:
        """By which a version is served, in order."""
        served = list(self.served.items())  # the registry's thread changes it
        return sorted(alias for (name, alias), v in served if name == model.name and v == model.version)

    def resolve(self, id: str) -> Version | None:
        """The version that an id means now; None is the backbone alone. May fetch files: it may take a while.

        Raises UnknownModel, and Unavailable when the files cannot be read or are not what was registered.
        """
        model = self.find(id)
        return None if model is None else self.known(model) or self.fetch(model)

    def find(self, id: str) -> Model | None:
        """What an id means now, from memory; None is the backbone alone. Raises UnknownModel and Unavailable."""
        if id == self.engine.name:
            return None
        if not self.looked:
            raise Unavailable("the registry of adapters could not be looked at yet; try again")
        name, which = id.removeprefix("task/"), ""
        names = self._named(name)
        if not names and "@" in name:  # the name of a task may hold "@" itself
            name, _, which = name.rpartition("@")
            names = self._named(name)
        if len(names) != 1:
            raise UnknownModel(f"there is no model {id[:100]!r} here; GET /v1/models lists them")
        [found], alias = names, which or CHAMPION
        number = self.served.get((found, alias))
        digits = alias.removeprefix("v")
        if number is None and digits.isdecimal() and len(digits) < 19:  # Python does not read thousands of them
            number = int(digits)
        model = next((m for m in self.models if m.name == found and m.version == number), None)
        if model is None and (found, alias) in self._postponed:
            raise Unavailable(f"{name[:100]} cannot be served yet; its {alias[:100]} could not be looked at")
        if model is None:
            raise UnknownModel(f"{name[:100]} has no version or alias {alias[:100]!r} here; GET /v1/models lists them")
        return model

    def known(self, model: Model) -> Version | None:
        """A version whose files were found right before."""
        return self._versions.get(f"{model.name}@{model.version}")

    def fetch(self, model: Model) -> Version:
        """A version whose files are looked at now. Raises Unavailable."""
        try:
            return self._fetch(model)
        except Exception as error:
            raise Unavailable("this model cannot be served now; the server's log says why") from error

    def refresh(self) -> None:
        """Look at the registry and deploy what has changed."""
        found = [m for m in models.list_models(self.settings) if same_backbone(m.backbone, self.engine.backbone.id)]
        wanted = {(m.name, alias): m for m in found for alias in m.aliases}
        self.models = tuple(found)
        self.looked = True
        present = {registered(model) for model in found}
        for key in [key for key in self.served if key not in wanted or self._deployed.get(key) not in present]:
            del self.served[key]
        for name, version in list(self._versions.items()):
            if registered(version.model) not in present:  # deleted, and perhaps another one has its number now
                del self._versions[name]
                self.engine.call(partial(self.engine.unload, name))
        changed = {
            key: model
            for key, model in wanted.items()
            if key not in self.served or self._deployed.get(key) != registered(model)
            if self._failed.get(key) != registered(model)
        }
        done = {key: self._deploy(key, model) for key, model in changed.items()}
        self._postponed = {key for key, deployment in done.items() if deployment.outcome == "postponed"}

    def _named(self, name: str) -> set[str]:
        """Registered names that a task's name, or one of themselves, means."""
        return {m.name for m in self.models if name in (m.task, m.name)}

    def _watch(self) -> None:
        tries = 0
        while not self._closing:
            self._wake.clear()
            try:
                self.refresh()
                self.problem = ""
            except Exception as error:  # the tracking store's client leaks the errors of its libraries
                self.problem = _told(error)
            self.ready.set()
            tries = min(tries + 1, 20) if self.problem or self._postponed else 0
            self._wake.wait(min(self.seconds, RETRY_SECONDS * 2 ** (tries - 1)) if tries else self.seconds)

    def _deploy(self, key: tuple[str, str], model: Model) -> Deployment:
        begin = time.perf_counter()
        before = self.served.get(key) or self._served_before(key, model.version)
        outcome, reason = "deployed", ""
        version: Version | None = None
        try:
            version = self._fetch(model)
            self.engine.call(partial(smoke, self.engine, version)).result()
        except Exception as error:  # whatever a broken adapter fails with
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            away = out_of_reach(error) or (version is not None and not _weights(version.folder))
            outcome = "postponed" if away else "refused"
        if outcome == "refused":
            self._failed[key] = registered(model)
            self._versions.pop(f"{model.name}@{model.version}", None)
            if key[1] == CHAMPION and before is not None:
                reason += self._give_back(model)
        elif outcome == "deployed":
            self.served[key] = model.version
            self._deployed[key] = registered(model)
            self._failed.pop(key, None)
        done = Deployment(
            datetime.now(UTC).isoformat(timespec="seconds"),
            model.name,
            model.task,
            key[1],
            model.version,
            before,
            outcome,
            reason,
            round(time.perf_counter() - begin, 3),
        )
        if not self._same_as_before(done):
            self.deployments.append(done)
            with contextlib.suppress(OSError):  # a full disk keeps no version from being served
                _remember(done)
        self.on_deployment(done)
        return done

    on_deployment: Callable[[Deployment], None] = staticmethod(lambda deployment: None)

    def _served_before(self, key: tuple[str, str], version: int) -> int | None:
        """What an alias meant before this process began, where that is another version."""
        earlier = [d.version for d in list(self.deployments) if (d.model, d.alias, d.outcome) == (*key, "deployed")]
        return earlier[-1] if earlier and earlier[-1] != version else None

    def _same_as_before(self, done: Deployment) -> bool:
        """A restart that takes up what was served."""
        earlier = [d for d in list(self.deployments) if (d.model, d.alias) == (done.model, done.alias)]
        return bool(earlier) and (earlier[-1].version, earlier[-1].outcome) == (done.version, done.outcome)

    def _give_back(self, model: Model) -> str:
        """Undo a promotion, unless another server or a person has; what to add to the reason."""
        try:
            back = models.rollback(self.settings, model.name, of=model.version)
        except Exception as error:
            return f" (and it stays champion: {_told(error)})"
        return f" (champion now: version {back.version})"

    def _fetch(self, model: Model) -> Version:
        """Its files, compared with what the registry says of them."""
        try:
            folder, _ = models.resolve(self.settings, f"{model.name}@{model.version}")
        except Exception as error:  # also that there are no files: it says nothing of those that were registered
            raise MetapeftError(_told(error)) from error
        if not _weights(folder):
            raise MetapeftError(f"the weights of {model.name} version {model.version} are gone from {folder}")
        if model.weights and models.weights_digest(folder) != model.weights:
            raise UserError(f"{model.name} version {model.version}: its weights are not those that were registered")
        saved = checkpoints.read(folder)
        form = saved.metadata.get("task")
        version = Version(model, folder, form if isinstance(form, dict) else {}, virtual_tokens(saved))
        self._versions[version.key] = version
        return version


def same_backbone(one: str, other: str) -> bool:
    """By name; a folder however it is written."""
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and os.path.samefile(one, other))


Registered = tuple[str, int, str, int]


def registered(model: Model) -> Registered:
    """Which version it is: a number may be given out again once a model was deleted."""
    return model.name, model.version, model.weights, model.created


def virtual_tokens(saved: Saved) -> int:
    """How many places of the context an adapter takes."""
    table = (saved.virtual or saved).tensors.get("prompt_embeddings")
    return 0 if table is None else int(table.shape[0])


def out_of_reach(error: BaseException | None) -> bool:
    """Whether a failure is of the store, a disk, the network or memory, and says nothing of what would be read."""
    while error is not None:
        if isinstance(error, OSError | MemoryError):
            return True
        if isinstance(error, MetapeftError) and not isinstance(error, UserError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _weights(folder: Path) -> bool:
    """Whether weights lie there."""
    return any(folder.rglob("*.safetensors"))


def _told(error: Exception) -> str:
    """A failure in one line; of other libraries' with its kind, which their messages are nothing without."""
    return str(error) if isinstance(error, MetapeftError) else f"{type(error).__name__}: {brief(error)}"


def smoke(engine: Engine, version: Version) -> None:
    """On the engine's thread: load a version and let it read and write a little. Raises UserError when that fails."""
    engine.unload(version.key)  # what is in memory must be what the files say now
    resident = engine.load(version)
    ids = engine.backbone.tokenizer.encode(PROBE, add_special_tokens=False)
    row = Row(list(ids) or [0], resident, 3)
    batch = engine.batch([row])
    logits: Logits = whole(batch.read_all(len(row.prompt)))
    for _ in range(3):
        if not bool(np.isfinite(np.array(logits)).all()):
            raise UserError(f"{version.key} failed its smoke test: what it computes is not finite")
        write([row], logits)
        logits = batch.step()


def history() -> Path:
    return home() / "serving" / "deployments.jsonl"


def _remember(deployment: Deployment) -> None:
    path = history()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:  # one write; its first character ends a line that a kill cut short
        file.write("\n" + json.dumps(asdict(deployment)) + "\n")


def _remembered() -> list[Deployment]:
    found = []
    try:
        lines = [line for line in history().read_text(encoding="utf-8").splitlines() if line][-HISTORY:]
    except (OSError, ValueError):  # not there, or no text
        return []
    for line in lines:
        try:
            values: dict[str, Any] = json.loads(line)
            found.append(Deployment(**values))
        except (ValueError, TypeError, RecursionError):  # torn by a kill
            continue
    return found
