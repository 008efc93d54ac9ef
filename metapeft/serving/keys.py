"""API keys: random, shown once, kept only as sha256, with a rate of their own; the file is read again when it changes.

A key is `mp-ID-SECRET` with 32 random bytes: nothing to guess, so one fast hash is enough (no password stretching).
Rotating a key gives it a new secret; the old one stays valid for a while so that its users can follow.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from metapeft.errors import UserError
from metapeft.progress import say
from metapeft.settings import home

PER_MINUTE = 600


@dataclass(frozen=True)
class Key:
    """per_minute: requests allowed. admin: may deploy. before, until: the rotated secret and when it ends (seconds)."""

    id: str
    name: str
    sha256: str
    created: str
    per_minute: int = PER_MINUTE
    admin: bool = False
    before: str = ""
    until: float = 0.0

    def described(self) -> dict[str, Any]:
        """Without hashes."""
        return {k: v for k, v in asdict(self).items() if k not in ("sha256", "before", "until")}


def path() -> Path:
    return home() / "serving" / "keys.json"


def load() -> list[Key]:
    """Raises UserError when the file is damaged: a server must not fall open."""
    try:
        text = path().read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"cannot read {path()}: {why}; check its permissions, or restore it") from error
    try:
        records = json.loads(text)
        if not isinstance(records, list):
            raise ValueError("it holds no list")
        keys = [Key(**record) for record in records]
        if not all(isinstance(value, str) for key in keys for value in (key.id, key.name, key.sha256, key.before)):
            raise ValueError("a key has no text where it needs one")
        return keys
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path()} is damaged ({error}); restore it, or remove it and create new keys") from error


def create(name: str, per_minute: int = PER_MINUTE, admin: bool = False) -> tuple[Key, str]:
    """A new key and its text, which is shown this once. Raises UserError for a name that is taken or odd."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", name):
        raise UserError(f"key name {name[:60]!r}: use up to 60 letters, digits, dots, dashes and underscores")
    with _changing() as keys:
        if any(key.name == name for key in keys):
            raise UserError(f"there is a key named {name!r}; rotate it, revoke it, or choose another name")
        id = secrets.token_hex(4)
        text = f"mp-{id}-{secrets.token_urlsafe(32)}"
        key = Key(id, name, _hash(text), datetime.now(UTC).isoformat(timespec="seconds"), per_minute, admin)
        keys.append(key)
    return key, text


def adopt(name: str, text: str, admin: bool = False) -> Key:
    """Make `text`, a secret made elsewhere (a platform's .env), the key `name`; repeating changes nothing.

    Raises UserError for a text of under 32 characters.
    """
    if len(text) < 32:
        raise UserError(f"the text given for key {name!r} has under 32 characters: it could be guessed")
    with _changing() as keys:
        place = next((n for n, key in enumerate(keys) if key.name == name), len(keys))
        if place == len(keys):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            keys.append(Key(secrets.token_hex(4), name, _hash(text), now, admin=admin))
        else:
            keys[place] = replace(keys[place], sha256=_hash(text), before="", until=0.0, admin=admin)
    return keys[place]


def rotate(name: str, grace_seconds: float = 3600.0) -> tuple[Key, str]:
    """A new secret; the present one stays valid for `grace_seconds`."""
    with _changing() as keys:
        place = _find(keys, name)
        text = f"mp-{keys[place].id}-{secrets.token_urlsafe(32)}"
        keys[place] = replace(
            keys[place], sha256=_hash(text), before=keys[place].sha256, until=time.time() + grace_seconds
        )
        key = keys[place]
    return key, text


def revoke(name: str) -> Key:
    """The key is invalid from now on."""
    with _changing() as keys:
        return keys.pop(_find(keys, name))


def _find(keys: list[Key], name: str) -> int:
    for place, key in enumerate(keys):
        if name in (key.name, key.id):
            return place
    raise UserError(f"there is no key {name[:60]!r}; there are: {', '.join(key.name for key in keys) or 'none'}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _changing() -> Iterator[list[Key]]:
    """One process at a time changes the file; readers see it before or after."""
    from metapeft.tracking.client import lock

    with lock("keys"):
        keys = load()
        yield keys
        path().parent.mkdir(parents=True, exist_ok=True)
        temporary = path().with_name(f".keys.{os.getpid()}.tmp")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump([asdict(key) for key in keys], file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path())


class Keyring:
    """The keys in force, and how much each has been used: a bucket that fills at the key's rate (`per_minute`)."""

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._needed = False
        self._stamp: tuple[int, int] | None = None
        self._buckets: dict[str, tuple[float, float]] = {}  # id -> (requests left, when that was)
        self._lock = threading.Lock()
        self._refresh()

    @property
    def any(self) -> bool:
        self._refresh()
        return bool(self._keys)

    @property
    def needed(self) -> bool:
        """Whether a caller must show a key: there are some, or there were, so that revoking the last one opens
        nothing."""
        self._refresh()
        return self._needed

    def find(self, text: str) -> Key | None:
        """The key that `text` is, else None; takes the same time for every wrong one."""
        self._refresh()
        digest, now = _hash(text), time.time()
        found = None
        for key in self._keys:
            same = hmac.compare_digest(digest, key.sha256)
            older = hmac.compare_digest(digest, key.before) and now < key.until
            if same or older:
                found = key
        return found

    def spend(self, key: Key) -> float:
        """Count one request; 0, or the seconds to wait when the key's rate is used up."""
        with self._lock:
            now = time.monotonic()
            left, at = self._buckets.get(key.id, (float(key.per_minute), now))
            left = min(float(key.per_minute), left + (now - at) * key.per_minute / 60)
            if left < 1:
                self._buckets[key.id] = (left, now)
                return (1 - left) * 60 / key.per_minute
            self._buckets[key.id] = (left - 1, now)
            return 0.0

    def _refresh(self) -> None:
        try:
            status = path().stat()
            stamp = (status.st_mtime_ns, status.st_ino)
        except OSError:
            stamp = None
        self._needed |= stamp is not None
        if stamp != self._stamp or stamp is None:
            try:
                self._keys = load()
            except UserError as error:
                if not self._keys:
                    raise
                say(f"keys: {error} (the keys read before stay in force)")  # neither open to all nor closed to all
            self._stamp = stamp
