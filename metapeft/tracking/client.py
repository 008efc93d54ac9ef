"""The connection to MLflow: SQLite in METAPEFT_HOME unless the settings or MLFLOW_TRACKING_URI name another store.

Importing MLflow takes seconds, so it happens here, inside functions, with its telemetry and its chatter off.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from metapeft.errors import MetapeftError, UserError, disk
from metapeft.settings import TrackingSettings, home, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https", "databricks")
# What PostgreSQL and MySQL say to a wrong name, password or database: trying again does not help.
_REFUSED = (
    *("authentication failed", "no password supplied", "no pg_hba.conf entry", "does not exist"),
    *("Access denied", "Unknown database"),
)
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is gone is reported in seconds, not in minutes
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def uri(settings: TrackingSettings) -> str:
    """Where runs are recorded: the setting, else MLFLOW_TRACKING_URI, else SQLite in METAPEFT_HOME."""
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def connect(settings: TrackingSettings) -> MlflowClient:
    """A client of the tracking store; the first call on a machine creates the SQLite database.

    Raises UserError when the store cannot be used, with what to do about it; MetapeftError while it is not reached.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    where = uri(settings)
    scheme = where.split(":", 1)[0].split("+", 1)[0]
    if scheme not in DATABASES + SERVERS:
        raise UserError(
            f"tracking uri {shown(where)!r} is not supported; use sqlite:///FILE, postgresql://… or an http(s) server"
        )
    if scheme == "sqlite":
        _create_database(_file(where))
    try:
        if scheme != "sqlite" and scheme in DATABASES:
            _log_in(where)
        return _client(where)
    except Exception as error:
        kind = MetapeftError if (_busy(error) if scheme == "sqlite" else _away(error)) else UserError
        raise kind(f"cannot use the tracking store {shown(where)}: {_reason(error, where)}") from error


def experiment_id(client: MlflowClient, settings: TrackingSettings) -> str:
    """The experiment of the settings, created when missing; its artifacts lie in METAPEFT_HOME or on the server."""
    from mlflow.exceptions import MlflowException

    name = settings.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        own = uri(settings).split(":", 1)[0] not in SERVERS
        try:
            return str(client.create_experiment(name, (home() / "mlartifacts").as_uri() if own else None))
        except MlflowException:  # another process was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment {name!r} was deleted in MLflow; restore it there or set tracking.experiment to another name"
        )
    return str(found.experiment_id)


@contextmanager
def failures(settings: TrackingSettings) -> Iterator[None]:
    """Turns MLflow's errors into MetapeftError with one clear line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        where = uri(settings)
        if (reason := disk(error)) is not None:
            raise MetapeftError(f"MLflow at {shown(where)}: {reason}") from error
        raise MetapeftError(f"MLflow at {shown(where)} refused: {_reason(error, where)}") from error


@contextmanager
def lock(name: str) -> Iterator[None]:
    """One process of this installation at a time. Raises UserError when METAPEFT_HOME cannot be written."""
    with locked(home() / "locks" / f"{name}.lock"):
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, whatever its METAPEFT_HOME is. path: of the lock's file. Raises UserError when its folder
    cannot be written."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path)
        held.acquire()
    except OSError as error:
        ours = path.is_relative_to(home())
        remedy = "set METAPEFT_HOME to a folder you may write in" if ours else "give a place you may write in"
        raise UserError(f"cannot write in {path.parent} ({error.strerror}); {remedy}") from error
    try:
        yield
    finally:
        held.release()


def _log_in(where: str) -> None:
    """Raises what the database says to a wrong name or password: MLflow would try it ten times, for 100 seconds.

    For one that is away MLflow's patience is right.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError

    engine = create_engine(where)
    try:
        engine.connect().close()
    except OperationalError as error:
        if not _away(error):
            raise
    finally:
        engine.dispose()


def _client(where: str) -> MlflowClient:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its tracebacks come as exceptions too
    client = MlflowClient(where, os.environ.get("MLFLOW_REGISTRY_URI") or where)
    client.search_experiments(max_results=1)  # connects, and checks the database's schema
    return client


def _file(where: str) -> Path:
    """The file of an SQLite address."""
    from sqlalchemy import make_url

    found = make_url(where).database
    if found in (None, "", ":memory:"):
        raise UserError(f"tracking uri {where!r} names no file, so nothing would be kept; use sqlite:///FILE")
    return Path(str(found))


def _create_database(path: Path) -> None:
    """MLflow's dozens of migrations run in a file of another name, so that a killed one leaves nothing half-made."""
    if _has_tables(path):
        return
    with locked(path.with_name(f".{path.name}.lock")):
        if _has_tables(path):
            return
        temporary = path.with_name(f".{path.name}.tmp")
        left_over = glob.escape(temporary.name) + "*"  # of a killed process, journal and all
        try:
            for file in path.parent.glob(left_over):
                file.unlink()
            _client(f"sqlite:///{temporary}")
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror}); set METAPEFT_HOME to a folder you may write in"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _has_tables(path: Path) -> bool:
    """Raises UserError when the file is not a database."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    try:
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True) as database:
            return bool(database.execute("select 1 from sqlite_master limit 1").fetchone())
    except sqlite3.DatabaseError as error:
        if _busy(error):
            raise MetapeftError(f"another process is writing {path} ({error}); try again") from error
        raise UserError(
            f"{path} is not a usable SQLite database ({error}); move it away or set tracking.uri"
        ) from error


def _busy(error: Exception) -> bool:
    """Whether SQLite only says that another process is writing."""
    return "database is locked" in str(error)


def _away(error: BaseException | None) -> bool:
    """Whether at the bottom of a failure is a server or database that was not reached: it may be back in a minute."""
    from sqlalchemy.exc import OperationalError

    while error is not None:
        if isinstance(error, OperationalError) and any(word in str(error) for word in _REFUSED):
            return False
        if isinstance(error, OperationalError) or (isinstance(error, OSError) and not isinstance(error, ValueError)):
            return True  # what requests raises is an OSError; for an address that is none also a ValueError
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception, where: str) -> str:
    text = " ".join(str(error).split())
    if "out-of-date database schema" in text:
        return f"it was made by another MLflow version; copy it, then run: mlflow db upgrade {shown(where)}"
    if "Max retries exceeded" in text or "Connection refused" in text:
        return "the server does not answer; start it or set tracking.uri"
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["message"]
    return shown(text)[:300]
