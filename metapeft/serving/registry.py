"""What may be served: the registry's versions for this backbone, and which of them each alias means here.

`refresh` looks at the registry. Where an alias means another version than before, that version is deployed: its files
are fetched and compared with the sha256 that the registry holds, it is loaded next to what is served, a smoke test runs
through it, and only then does the alias change. What fails stays out, requests go on with the version before, and a
failed champion's place is given back in the registry. Requests hold the version that they began with.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metapeft.errors import MetapeftError, UserError
from metapeft.peft import checkpoints
from metapeft.serving.generate import Logits, Row, write
from metapeft.settings import Settings, home
from metapeft.tracking import models
from metapeft.tracking.models import CHAMPION, Model

if TYPE_CHECKING:
    from metapeft.serving.engine import Engine

PROBE = "Hello"
HISTORY = 200  # deployments that are remembered


class UnknownModel(UserError):
    """No such model is served."""


@dataclass(frozen=True)
class Version:
    """A registered adapter whose files are here and are what was registered."""

    model: Model
    folder: Path
    form: dict[str, Any]  # how its task asks: name, kind, labels, template ({} in folders that do not say)

    @property
    def key(self) -> str:
        return f"{self.model.name}@{self.model.version}"


@dataclass(frozen=True)
class Deployment:
    """What became of a version that an alias was to mean. outcome: "deployed" or "refused"."""

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
        self.engine, self.settings, self.seconds = engine, settings, seconds
        self.ready = threading.Event()
        self.problem = ""  # why the last look at the registry failed
        self.models: tuple[Model, ...] = ()
        self.served: dict[tuple[str, str], int] = {}  # (name, alias) -> version
        self.deployments: deque[Deployment] = deque(_remembered(), maxlen=HISTORY)
        self._versions: dict[str, Version] = {}
        self._failed: dict[tuple[str, str], int] = {}
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
        """Look at the registry now; a version of `name` that failed before gets another chance."""
        self._failed = {key: version for key, version in self._failed.items() if name not in (None, key[0])}
        self._wake.set()

    def ids(self) -> list[tuple[str, Model]]:
        """What `model` may be: `task/NAME@ALIAS` for what is deployed, `task/NAME@VERSION` for all."""
        found = []
        for model in self.models:
            aliases = [a for (name, a), v in self.served.items() if name == model.name and v == model.version]
            found += [(f"task/{model.task}@{which}", model) for which in [*sorted(aliases), str(model.version)]]
        return found

    def resolve(self, id: str) -> Version | None:
        """The version that an id means now; None is the backbone alone. May fetch files: it may take a while.

        Raises UnknownModel, and UserError when the files are not what was registered.
        """
        if id == self.engine.name:
            return None
        name, _, which = id.removeprefix("task/").partition("@")
        names = sorted({m.name for m in self.models if name in (m.task, m.name)})
        if len(names) != 1:
            raise UnknownModel(f"there is no model {id[:100]!r} here; GET /v1/models lists them")
        alias = which or CHAMPION
        number = self.served.get((names[0], alias))
        digits = alias.removeprefix("v")
        if number is None and digits.isdecimal() and len(digits) < 19:  # Python does not read thousands of them
            number = int(digits)
        model = next((m for m in self.models if m.name == names[0] and m.version == number), None)
        if model is None:
            raise UnknownModel(f"{name[:100]} has no version or alias {alias[:100]!r} here; GET /v1/models lists them")
        return self._versions.get(f"{model.name}@{model.version}") or self._fetch(model)

    def refresh(self) -> None:
        """Look at the registry and deploy what has changed."""
        found = [m for m in models.list_models(self.settings) if m.backbone == self.engine.backbone.id]
        wanted = {(m.name, alias): m for m in found for alias in m.aliases}
        self.models = tuple(found)
        for key in [key for key in self.served if key not in wanted]:
            del self.served[key]
        for key, model in wanted.items():
            if self.served.get(key) != model.version and self._failed.get(key) != model.version:
                self._deploy(key, model)

    def _watch(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                self.refresh()
                self.problem = ""
            except MetapeftError as error:
                self.problem = str(error)
            except Exception as error:  # the tracking store's client leaks the errors of its libraries
                self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.ready.set()
            self._wake.wait(self.seconds)

    def _deploy(self, key: tuple[str, str], model: Model) -> None:
        begin = time.perf_counter()
        before = self.served.get(key) or self._served_before(key, model.version)
        reason = ""
        try:
            version = self._fetch(model)
            self.engine.call(lambda: smoke(self.engine, version)).result()
        except Exception as error:  # whatever a broken adapter fails with
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        if reason:
            self._failed[key] = model.version
            if key[1] == CHAMPION and before is not None:
                reason += self._give_back(model)
        else:
            self.served[key] = model.version
            self._failed.pop(key, None)
        done = Deployment(
            datetime.now(UTC).isoformat(timespec="seconds"),
            model.name,
            model.task,
            key[1],
            model.version,
            before,
            "refused" if reason else "deployed",
            reason,
            round(time.perf_counter() - begin, 3),
        )
        if not self._same_as_before(done):
            self.deployments.append(done)
            _remember(done)
        self.on_deployment(done)

    on_deployment: Callable[[Deployment], None] = staticmethod(lambda deployment: None)

    def _served_before(self, key: tuple[str, str], version: int) -> int | None:
        """What an alias meant before this process began, where that is another version."""
        earlier = [d.version for d in self.deployments if (d.model, d.alias, d.outcome) == (*key, "deployed")]
        return earlier[-1] if earlier and earlier[-1] != version else None

    def _same_as_before(self, done: Deployment) -> bool:
        """A restart that takes up what was served."""
        earlier = [d for d in self.deployments if (d.model, d.alias) == (done.model, done.alias)]
        return bool(earlier) and (earlier[-1].version, earlier[-1].outcome) == (done.version, done.outcome)

    def _give_back(self, model: Model) -> str:
        """Undo a promotion, unless another server or a person has; what to add to the reason."""
        try:
            back = models.rollback(self.settings, model.name, of=model.version)
        except MetapeftError as error:
            return f" (and it stays champion: {error})"
        return f" (champion now: version {back.version})"

    def _fetch(self, model: Model) -> Version:
        """Its files, compared with what the registry says of them; a version that fails is no longer served."""
        self._versions.pop(f"{model.name}@{model.version}", None)
        folder, _ = models.resolve(self.settings, f"{model.name}@{model.version}")
        if model.weights and models.weights_digest(folder) != model.weights:
            raise UserError(f"{model.name} version {model.version}: its weights are not those that were registered")
        form = checkpoints.read(folder).metadata.get("task")
        version = Version(model, folder, form if isinstance(form, dict) else {})
        self._versions[version.key] = version
        return version


def smoke(engine: Engine, version: Version) -> None:
    """On the engine's thread: load a version and let it read and write a little. Raises UserError when that fails."""
    engine.unload(version.key)  # what is in memory must be what the files say now
    resident = engine.load(version)
    ids = engine.backbone.tokenizer.encode(PROBE, add_special_tokens=False)
    row = Row(list(ids) or [0], resident, 3)
    batch = engine.batch([row])
    logits: Logits = batch.read_all(len(row.prompt))
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
