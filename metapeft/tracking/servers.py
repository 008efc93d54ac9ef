"""Running servers, and telling them that the registry has changed.

A server leaves a note in METAPEFT_HOME/servers, readable by its owner only: where it listens and a token of its own.
It holds a lock on it while it runs, which ends with the process whatever ended that: a note without one is of a server
that was killed (process numbers are given out again, locks are not).
Machines and containers that share METAPEFT_HOME leave each other's notes alone: an address there is local. A server
elsewhere is named by METAPEFT_SERVER (its address) and METAPEFT_SERVER_KEY (a key that may administer).
Servers also look at the registry by themselves now and then: a message that does not arrive only delays.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import platform
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from metapeft.progress import say
from metapeft.settings import home

SECONDS = 3.0  # what a server may take to answer: it only takes note


def folder() -> Path:
    return home() / "servers"


@contextmanager
def listed(url: str, token: str) -> Iterator[None]:
    """While the block runs, this process is a server at `url` that obeys `token`."""
    host, pid = platform.node(), os.getpid()
    path = folder() / f"{re.sub('[^A-Za-z0-9._-]+', '-', host)}-{pid}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"url": url, "token": token, "host": host}, file)
        file.flush()
        os.replace(temporary, path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def tell(name: str) -> int:
    """Tell every server that the registered model `name` has changed; how many took note. Never fails."""
    told = 0
    for url, token in known():
        try:
            _post(f"{url}/v1/deploy", token, {"model": name})
            told += 1
        except (OSError, ValueError, http.client.HTTPException) as error:  # silent, no address, or no HTTP
            say(f"the server at {url} could not be told that {name} has changed ({error}); it will look by itself")
    return told


def known() -> Iterator[tuple[str, str]]:
    """(address, token) of every server that runs here, and of the one that METAPEFT_SERVER names."""
    found = {note["url"]: note["token"] for note, lives, _ in _notes() if lives}
    if url := os.environ.get("METAPEFT_SERVER", "").rstrip("/"):
        found = {url: os.environ.get("METAPEFT_SERVER_KEY") or found.get(url, "")} | found
    yield from found.items()


def gone() -> Iterator[tuple[str, Path]]:
    """(address, note) of every server that ran here and was killed. Where another one serves that address now, the note
    is removed."""
    notes = list(_notes())
    again = {note["url"] for note, lives, _ in notes if lives}
    for note, lives, path in notes:
        if not lives and note["url"] in again:
            path.unlink(missing_ok=True)
        elif not lives:
            yield note["url"], path


def _notes() -> Iterator[tuple[dict[str, str], bool, Path]]:
    """What every server of this machine (or container) has left, and whether it runs; damaged notes are passed over."""
    here = platform.node()
    for path in sorted(folder().glob("*.json")):
        with suppress(OSError, ValueError, AttributeError), path.open(encoding="utf-8") as file:
            note = json.load(file)
            if note.get("host") == here and note.keys() >= {"url", "token"}:
                yield note, _locked(file), path


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _post(url: str, token: str, body: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=SECONDS) as answer:
        answer.read()
