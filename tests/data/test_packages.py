"""Packages through the real pip and npm, from registries that these tests run themselves."""

import base64
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from metapeft.data import packages
from metapeft.data.catalog import Archive
from metapeft.errors import MetapeftError, UserError
from tests.faults import damages

NAME, VERSION = "metapeft-sample-data", "1.0"
WHEEL = f"{NAME.replace('-', '_')}-{VERSION}-py3-none-any.whl"
ROWS = b'{"text": "a", "label": "x"}\n'


def wheel(padding: int = 0) -> bytes:
    """A wheel with one data file and one that no task needs."""
    info = f"{NAME.replace('-', '_')}-{VERSION}.dist-info"
    files = {
        "sample/rows.jsonl": ROWS,
        "sample/other.bin": os.urandom(padding),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return out.getvalue()


def sdist(hook: str = "pass") -> bytes:
    """An sdist whose build backend is in itself, so that nothing else is fetched; asked for metadata it runs `hook`."""
    root = f"{NAME.replace('-', '_')}-{VERSION}"
    metadata = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
    backend = f"""
import os
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    {hook}
    name = "{root}.dist-info"
    os.mkdir(os.path.join(folder, name))
    open(os.path.join(folder, name, "METADATA"), "w").write({metadata!r})
    return name
def build_wheel(*arguments, **options):
    raise RuntimeError("nothing is to be built")
"""
    files = {
        f"{root}/PKG-INFO": metadata.encode(),
        f"{root}/pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n',
        f"{root}/own.py": backend.encode(),
        f"{root}/sample/rows.jsonl": ROWS,
    }
    return tar(files)


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return out.getvalue()


def archive(content: bytes, registry: str = "pypi-wheel", members: tuple[str, ...] = ("*rows.jsonl",)) -> Archive:
    digest = hashlib.sha256(content).hexdigest()
    return Archive("sample", registry, NAME, VERSION, digest, len(content), "MIT", members)


class Registry(http.server.BaseHTTPRequestHandler):
    """A PyPI simple index and an npm registry with one package; may stop in the middle of a file."""

    content = b""
    stall_after: int | None = None
    downloads = 0

    def do_GET(self) -> None:
        file = self.path.split("/")[-1]
        if self.path == f"/simple/{NAME}/":
            names = (WHEEL, f"{NAME.replace('-', '_')}-{VERSION}.tar.gz")
            self.answer("".join(f'<a href="/files/{name}">{name}</a>' for name in names).encode(), "text/html")
        elif file.endswith((".whl", ".gz", ".tgz")):
            type(self).downloads += 1
            self.answer(self.content, "application/octet-stream")
        elif self.path == f"/{NAME}":
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(self.content).digest()).decode()
            tarball = f"http://{self.headers['Host']}/{NAME}/-/{NAME}-{VERSION}.0.tgz"
            facts = {"name": NAME, "version": "1.0.0", "dist": {"tarball": tarball, "integrity": integrity}}
            listing = {"name": NAME, "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": facts}}
            self.answer(json.dumps(listing).encode(), "application/json")
        else:
            self.send_error(404)

    def answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.stall_after is not None and len(body) > self.stall_after:
            self.wfile.write(body[: self.stall_after])
            self.wfile.flush()
            time.sleep(60)
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Registry]]:
    """The registry that pip and npm are set up for."""
    handler = type("OneRegistry", (Registry,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{at}/simple/")
    monkeypatch.setenv("npm_config_registry", at)
    yield handler
    server.shutdown()
    server.server_close()


def test_a_wheel_is_reduced_to_what_is_needed(
    registry: type[Registry], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.content = wheel(1000)
    wanted = archive(registry.content)
    folder = packages.unpacked(wanted)
    assert (folder / "sample" / "rows.jsonl").read_bytes() == ROWS
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["complete.json", "rows.jsonl"]
    assert not list((home / "data" / "archives").glob(".*"))  # the archive itself is gone
    assert f"fetching {NAME} {VERSION} (" in capsys.readouterr().err
    packages.unpacked(wanted)
    assert registry.downloads == 1


@pytest.mark.parametrize("hook", ["pass", "import time; time.sleep(100)"])
def test_an_sdist_is_not_waited_for(registry: type[Registry], hook: str) -> None:
    registry.content = sdist(hook)
    start = time.monotonic()
    folder = packages.unpacked(archive(registry.content, "pypi-sdist"))
    assert next(folder.rglob("rows.jsonl")).read_bytes() == ROWS
    assert time.monotonic() - start < 60


def test_an_npm_package(registry: type[Registry]) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not here")
    manifest = json.dumps({"name": NAME, "version": "1.0.0"}).encode()
    registry.content = tar({"package/package.json": manifest, "package/data/rows.jsonl": ROWS})
    wanted = Archive(
        "sample", "npm", NAME, "1.0.0", hashlib.sha256(registry.content).hexdigest(), 1000, "MIT", ("*rows.jsonl",)
    )
    assert (packages.unpacked(wanted) / "package" / "data" / "rows.jsonl").read_bytes() == ROWS
    changed = Archive("other", "npm", NAME, "1.0.0", "0" * 64, 1000, "MIT", ("*rows.jsonl",))
    with pytest.raises(MetapeftError, match="do not use"):
        packages.unpacked(changed)


def test_without_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not here; install Node\.js"):
        packages.unpacked(archive(b"", "npm"))


def test_without_pip_uv_runs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "uv").write_text("")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = packages.pip_command(archive(b""), tmp_path)
    assert command[:3] == [str(tmp_path / "uv"), "tool", "run"] and "--require-hashes" in command
    (tmp_path / "uv").unlink()
    with pytest.raises(UserError, match="ensurepip"):
        packages.pip_command(archive(b""), tmp_path)


def test_a_changed_file_is_refused(registry: type[Registry], home: Path) -> None:
    registry.content = wheel()
    with pytest.raises(MetapeftError, match="its sha256 is not the one that the catalog lists"):
        packages.unpacked(archive(b"something else"))
    assert not [p for p in (home / "data" / "archives").iterdir() if p.is_dir()]


def test_an_unreachable_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    with pytest.raises(MetapeftError) as caught:
        packages.unpacked(archive(wheel()))
    assert not isinstance(caught.value, UserError)  # nobody's mistake: a DAG tries again
    assert f"cannot download {NAME} {VERSION}" in str(caught.value) and "check the network" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_member_is_said(registry: type[Registry]) -> None:
    registry.content = wheel()
    with pytest.raises(MetapeftError, match=r"holds no file like nothing\.csv"):
        packages.unpacked(archive(registry.content, members=("nothing.csv",)))


@pytest.mark.parametrize("name", ["../outside.jsonl", "/tmp/outside.jsonl", "a/../../outside.jsonl"])
def test_members_stay_inside(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.tar.gz").write_bytes(tar({name: ROWS}))
    with pytest.raises(MetapeftError, match="leads outside"):
        packages.keep_members(tmp_path / "bad.tar.gz", archive(b"", members=("*",)), tmp_path / "in")
    assert not (tmp_path / "outside.jsonl").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "links.tar.gz", "w:gz") as packed:
        link = tarfile.TarInfo("rows.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        packed.addfile(link)
    with pytest.raises(MetapeftError, match="holds no file"):
        packages.keep_members(tmp_path / "links.tar.gz", archive(b""), tmp_path / "in")


def fetch(wanted: Archive) -> None:
    packages.unpacked(wanted)


def test_several_processes_download_once(registry: type[Registry]) -> None:
    registry.content = wheel()
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=fetch, args=(archive(registry.content),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert registry.downloads == 1


def test_a_killed_download_leaves_nothing_in_the_way(registry: type[Registry], home: Path) -> None:
    registry.content = wheel(1_000_000)
    wanted = archive(registry.content)
    registry.stall_after = 500_000
    process = multiprocessing.get_context("spawn").Process(target=fetch, args=(wanted,))
    process.start()
    deadline = time.monotonic() + 60
    while not registry.downloads and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list((home / "data" / "archives").glob(".*.partial"))  # it was in the middle
    registry.stall_after = None
    folder = packages.unpacked(wanted)
    assert (folder / "sample" / "rows.jsonl").read_bytes() == ROWS
    assert not list((home / "data" / "archives").glob(".*.partial"))


@pytest.mark.parametrize("name", [packages.COMPLETE, "sample/rows.jsonl"])
def test_a_damaged_folder_is_made_again(registry: type[Registry], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    registry.content = wheel()
    wanted = archive(registry.content)
    folder = packages.unpacked(wanted)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # pip itself is tried above; here it would take most of the time.
    packed = folder.parent / "packed.whl"
    packed.write_bytes(registry.content)
    fetched: list[Archive] = []
    monkeypatch.setattr(packages, "download", lambda known, into: fetched.append(known) or packed)
    for number, how in enumerate(damages.NAMES, start=1):
        damages.damage(folder / name, how)
        assert packages.unpacked(wanted) == folder, how
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole, how
        assert len(fetched) == number, how


def test_a_folder_that_cannot_be_written(
    registry: type[Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match="set METAPEFT_HOME to a writable folder"):
        packages.unpacked(archive(wheel()))
