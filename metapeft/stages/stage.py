"""What every stage shares: a declared set of inputs, an output folder that appears whole or not at all, and a `main`.

A stage writes one folder, `WORK/NAME`, from the settings and the earlier stages' folders that it declares. It is a pure
function of those, so a finished stage whose inputs have not changed is not run again. DVC, Airflow and the command line
all run the same `Stage`; `dvc.yaml` repeats the declarations, and a test compares the two.
"""

from __future__ import annotations

import _thread
import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metapeft.errors import MetapeftError, UserError, disk
from metapeft.files import clear
from metapeft.progress import quiet, say
from metapeft.settings import NULL, Settings, brief, load_settings, user_path

ROOT = Path(__file__).resolve().parents[2]  # what `Stage.code` is relative to
QUIET_SECONDS = 3.0  # of waiting for another command, before a person is told
PARENT = "METAPEFT_PARENT"  # process id of whoever started this stage; the stage ends when it dies


@dataclass(frozen=True)
class Result:
    """What a finished stage hands on: its folder, a small JSON summary, and whether it was there already."""

    stage: str
    folder: Path
    summary: Any
    cached: bool
    seconds: float

    @property
    def warnings(self) -> list[str]:
        """What a person should know, though it stops nothing (`warnings` in the summary)."""
        return list(self.summary.get("warnings", ())) if isinstance(self.summary, dict) else []


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    `body(settings, work, out)` reads `work/NEED` for each of `needs` (and of `uses`, where it is there): folders of
    earlier stages, or files in them. It writes files into the empty folder `out` and returns a small JSON summary.
    `settings` are the dotted names it reads; `code` the files and folders (beside the package) whose change makes the
    output stale; `outside(settings, work)` fingerprints what it reads from elsewhere, such as the user's file.
    """

    name: str
    body: Callable[[Settings, Path, Path], dict[str, Any]]
    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    outside: Callable[[Settings, Path], str] | None = None

    def run(self, settings: Settings, work: Path) -> Result:
        """Run the stage unless its output is there and current. Raises UserError (bad input) or MetapeftError."""
        started = time.perf_counter()
        for need in self.needs:
            if not (work / need).exists():
                stage = need.partition("/")[0]
                raise UserError(f"{self.name} needs {need}, which is not in {work}; run the stage {stage} first")
        with locked(work, self.name):
            inputs = self.fingerprint(settings, work)
            done = self._finished(work, inputs)
            if done is not None:
                return Result(self.name, work / self.name, done, True, time.perf_counter() - started)
            try:
                summary = self._write(settings, work, inputs)
            except MetapeftError:
                raise
            except Exception as error:
                if (changed := self._changed(work)) is None:
                    raise
                raise UserError(
                    f"{self.name} cannot use {work / changed}, which is not as the stage {changed} wrote it"
                    f" ({type(error).__name__}: {brief(error)}); run the stage {changed} again"
                ) from error
        return Result(self.name, work / self.name, summary, False, time.perf_counter() - started)

    def fingerprint(self, settings: Settings, work: Path) -> str:
        """sha256 of everything the output depends on."""
        values = settings.model_dump(mode="json")
        if "backbone" in self.settings:
            values["backbone"] = backbone_identity(settings)
        parts = {
            "settings": {name: dotted(values, name) for name in self.settings},
            "needs": {need: content(work / need) for need in (*self.needs, *self.uses)},
            "code": {path: content(ROOT / path) for path in self.code},
            "outside": self.outside(settings, work) if self.outside else "",
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """The stage as a process."""
        parser = options(self.name, self.body.__doc__)
        return process(parser, lambda settings, given: self.run(settings, given.work), arguments)

    def current(self, settings: Settings, work: Path) -> bool:
        """Whether the output is there and of these very inputs."""
        return self._finished(work, self.fingerprint(settings, work)) is not None

    def _finished(self, work: Path, inputs: str) -> dict[str, Any] | None:
        """The summary of a current output, or None. The record counts only for the very files it was written for."""
        try:
            record = json.loads(self._record(work).read_text(encoding="utf-8"))
            if record["inputs"] != inputs or record["output"] != content(work / self.name):
                return None
            return record["summary"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _changed(self, work: Path) -> str | None:
        """An earlier stage whose output is not what its record says; alone no fault, for DVC may bring back another."""
        for stage in dict.fromkeys(need.partition("/")[0] for need in (*self.needs, *self.uses)):
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                record = json.loads((work / ".stages" / f"{stage}.json").read_text(encoding="utf-8"))
                if record["output"] != content(work / stage):
                    return stage
        return None

    def _write(self, settings: Settings, work: Path, inputs: str) -> dict[str, Any]:
        final, record = work / self.name, self._record(work)
        for left_over in work.glob(f".{self.name}-*.tmp"):  # of a killed run: we hold the lock, so nobody writes there
            shutil.rmtree(left_over, ignore_errors=True)
        out = Path(tempfile.mkdtemp(prefix=f".{self.name}-", suffix=".tmp", dir=work))
        try:
            out.chmod(0o755)
            summary = self.body(settings, work, out)
            clear(record)
            record.unlink(missing_ok=True)
            if final.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{self.name}-", suffix=".tmp", dir=work))
                final.rename(old / "old")
                shutil.rmtree(old, ignore_errors=True)
            out.rename(final)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
        write_json(record, {"inputs": inputs, "output": content(final), "summary": summary})
        return summary

    def _record(self, work: Path) -> Path:
        return work / ".stages" / f"{self.name}.json"


def options(name: str, description: str | None) -> argparse.ArgumentParser:
    """What every process of the pipeline understands."""
    parser = argparse.ArgumentParser(prog=f"python -m metapeft.stages.{name}", description=description)
    parser.add_argument("--params", type=Path, help="settings file (default: params.yaml where there is one)")
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="folder of all stages' outputs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting, e.g. sweep.trials=4; null is its default",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def process(
    parser: argparse.ArgumentParser,
    run: Callable[[Settings, argparse.Namespace], Result],
    arguments: Sequence[str] | None = None,
) -> int:
    """`run(settings, options)` as a process: log on stderr, summary as one JSON line on stdout; exit code 0, 1 or 2."""
    given = parser.parse_args(arguments)
    hear_interrupts()
    end_with_parent()
    quiet()
    try:
        params = given.params or (Path("params.yaml") if Path("params.yaml").exists() else None)
        result = run(load_settings(params, **nested(assignments(given.set))), given)
    except Exception as error:
        return report_failure(error, given.debug)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    for warning in result.warnings:
        print(f"{result.stage}: {warning}", file=sys.stderr)
    print(f"{result.stage}: {'unchanged' if result.cached else f'done in {result.seconds:.1f} s'}", file=sys.stderr)
    print(json.dumps(result.summary), flush=True)
    return 0


def locked(work: Path, name: str) -> Any:
    """One writer per stage output. Raises UserError when `work` cannot be written."""
    from filelock import FileLock

    folder = work / ".stages"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write in {work} ({error.strerror}); give a folder you may write in") from error
    return FileLock(folder / f"{name}.lock", is_singleton=True)  # one thread may take it twice


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """No other command runs its pipeline in this folder, or each would go on with half of the other's outputs."""
    from filelock import Timeout

    lock = locked(work, "pipeline")
    try:
        lock.acquire(timeout=QUIET_SECONDS)
    except Timeout:
        say(f"waiting for another command that works in {work}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def content(path: Path) -> str:
    """sha256 of a file, or of a folder's relative names and contents without hidden files ("": there is nothing)."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return ""
    digest = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file_path.relative_to(path)
        if "__pycache__" in name.parts or any(part.startswith(".") for part in name.parts):
            continue
        digest.update(f"{name.as_posix()}\0{content(file_path)}\n".encode())
    return digest.hexdigest()


def backbone_identity(settings: Settings) -> str:
    """`metapeft.backbones.identity`, which is the name itself where no folder is named."""
    if not os.path.isdir(user_path(settings.backbone)):
        return settings.backbone
    from metapeft.backbones import identity  # imports MLX

    return identity(settings.backbone)


def dotted(values: dict[str, Any], name: str) -> Any:
    """The value of a dotted name in nested dicts."""
    for part in name.split("."):
        values = values[part]
    return values


def scalar(text: str) -> Any:
    """A value given on a command line: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """["rank=8", "name=x"] -> {"rank": 8, "name": "x"}. Raises UserError for a pair without "="."""
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {brief(pair, 60)!r} is not KEY=VALUE; write for example --set rank=8")
        values[key.strip()] = scalar(value.strip())
    return values


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"sweep.trials": 4} -> {"sweep": {"trials": 4}}, for `load_settings`: null takes a setting's value away."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(
                    f"--set {brief(name, 60)}: {brief(section, 60)} already has a value; give only one of them"
                )
        place[key] = NULL if value is None else value
    return result


def write_json(path: Path, value: Any) -> None:
    """Write JSON, keys sorted, so that a reader sees the old file or the new one, never a part."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        clear(path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Raises UserError when the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); run the stage that writes it first") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({brief(error)}); run the stage that writes it again") from error


def report_failure(error: Exception, debug: bool) -> int:
    """One line on stderr for people; the exit code. The traceback only where it was asked for."""
    if debug:
        import traceback

        traceback.print_exception(error)
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MetapeftError):
        print(f"error: {message}", file=sys.stderr)
        return error.exit_code
    if (reason := disk(error)) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    hint = "" if debug else "; run with --debug for the traceback"
    print(f"error: {type(error).__name__}: {message}{hint}", file=sys.stderr)
    return 1


def hear_interrupts() -> None:
    """SIGTERM stops like Ctrl-C, so that a trial in hand is given back. And an interrupt that comes while Python runs a
    finalizer or a library's callback is thrown away there: it is raised again, a moment later and elsewhere."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    ignored = sys.unraisablehook

    def again(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.1, _thread.interrupt_main).start()
        else:
            ignored(unraisable)

    if ignored is sys.__unraisablehook__:
        sys.unraisablehook = again


def end_with_parent() -> None:
    """Belong to the process named in METAPEFT_PARENT, if that is who started this one.

    When it is gone (a worker killed with -9) this process ends, with whatever it started.
    """
    parent = os.environ.get(PARENT)
    if not parent or os.getppid() != int(parent):
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
