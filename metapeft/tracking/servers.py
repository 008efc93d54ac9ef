"""Running servers, and telling them that the registry has changed.

A server leaves a note in METAPEFT_HOME/servers, readable by its owner only: where it listens and a token of its own.
Machines and containers that share METAPEFT_HOME leave each other's notes alone: an address there is local. A server
elsewhere is named by METAPEFT_SERVER (its address) and METAPEFT_SERVER_KEY (a key that may administer).
Servers also look at the registry by themselves now and then: a message that does not arrive only delays.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
        json.dump({"url": url, "token": token, "host": host, "pid": pid}, file)
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
    if url := os.environ.get("METAPEFT_SERVER"):
        yield url.rstrip("/"), os.environ.get("METAPEFT_SERVER_KEY", "")
    if not folder().is_dir():
        return
    here = platform.node()
    for path in sorted(folder().glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged
            note = json.loads(path.read_text(encoding="utf-8"))
            if note.get("host", here) != here:  # another machine's or container's: its processes cannot be seen
                continue
            if _lives(note.get("pid", path.stem)):  # before 'host' and 'pid' were written, the name was the process
                yield note["url"], note["token"]
            else:
                path.unlink(missing_ok=True)  # it was killed


def _lives(pid: int | str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _post(url: str, token: str, body: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=SECONDS) as answer:
        answer.read()
