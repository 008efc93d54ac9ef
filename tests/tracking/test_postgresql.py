"""Runs in a real PostgreSQL, and what is said of one that cannot be used. Skipped where there is no server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from metapeft import tracking
from metapeft.errors import MetapeftError, UserError
from metapeft.settings import Settings, load_settings
from tests.search.postgresql import Server, postgresql


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgresql() as started:
        yield started


def settings(url: str) -> Settings:
    return load_settings(tracking={"uri": url.replace("postgresql:", "postgresql+psycopg:")})


def protected(server: Server) -> None:
    """The server asks for passwords from now on."""
    import psycopg

    with psycopg.connect(server.url, autocommit=True) as database:
        database.execute("alter user sweeper password 'secret'")
        (Path(server.folder) / "data/pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        database.execute("select pg_reload_conf()")


def test_wrong_names_are_bad_input_and_an_outage_is_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    protected(server)
    with tracking.run(settings(server.url), "here") as tracker:
        tracker.log_metrics({"score": 0.5})
    wrong = {
        "password": server.url.replace("secret", "forgotten"),
        "no password": server.url.replace(":secret", ""),
        "database": server.url.replace("/postgres", "/elsewhere"),
        "role": server.url.replace("sweeper", "nobody"),
    }
    for url in wrong.values():
        with pytest.raises(UserError, match="cannot use the tracking store") as refused:
            tracking.run(settings(url), "there").__enter__()
        assert "secret" not in str(refused.value) and "forgotten" not in str(refused.value)
    server.stop()
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 2)  # else 100 seconds
    try:
        with pytest.raises(MetapeftError, match="cannot use the tracking store") as away:
            tracking.run(settings(server.url), "there").__enter__()
    finally:
        server.start()
    assert away.value.exit_code == 1 and "secret" not in str(away.value)
