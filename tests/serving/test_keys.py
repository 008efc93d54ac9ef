"""Keys: what is on the disk, who gets in, how much, and that a change counts at once."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest

from metapeft.cli import main
from metapeft.errors import UserError
from metapeft.serving import keys


def test_only_a_hash_is_kept_and_only_for_the_owner(home: Path) -> None:
    key, text = keys.create("app")
    content = keys.path().read_text(encoding="utf-8")
    assert text not in content and text.rsplit("-", 1)[1] not in content
    assert stat.S_IMODE(keys.path().stat().st_mode) == 0o600
    assert keys.Keyring().find(text) == key
    assert keys.Keyring().find(text + "x") is None and keys.Keyring().find("") is None


def test_a_rotated_key_has_a_grace_and_a_revoked_one_none(home: Path) -> None:
    ring = keys.Keyring()
    _, first = keys.create("app")
    _, second = keys.rotate("app", grace_seconds=0.5)
    assert ring.find(first) is not None and ring.find(second) is not None
    time.sleep(0.6)
    assert ring.find(first) is None and ring.find(second) is not None
    keys.revoke("app")
    assert ring.find(second) is None and not ring.any


def test_the_rate_is_a_bucket_that_fills_again(home: Path) -> None:
    key, _ = keys.create("app", per_minute=120)
    ring = keys.Keyring()
    assert [ring.spend(key) for _ in range(120)] == [0.0] * 120
    wait = ring.spend(key)
    assert 0 < wait <= 0.5
    time.sleep(wait + 0.02)
    assert ring.spend(key) == 0


def test_a_damaged_file_never_opens_the_door(home: Path) -> None:
    _, text = keys.create("app")
    ring = keys.Keyring()
    keys.path().write_text("[{", encoding="utf-8")
    assert ring.find("anything") is None and ring.any, "the keys read before stay in force"
    assert ring.find(text) is not None
    with pytest.raises(UserError, match="damaged"):
        keys.Keyring()


def test_the_commands(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "app", "--per-minute", "5", "--admin", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["admin"] and keys.Keyring().find(made["key"]) is not None
    assert main(["keys", "create", "app"]) == 2
    assert main(["keys", "create", "no spaces"]) == 2
    assert main(["keys", "rotate", "app", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["key"] != made["key"]
    assert main(["keys", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [key["name"] for key in listed] == ["app"] and "sha256" not in listed[0]
    assert main(["keys", "revoke", "app"]) == 0 and main(["keys", "revoke", "app"]) == 2
    assert keys.load() == []


def test_a_secret_made_elsewhere_is_adopted_and_may_change(home: Path) -> None:
    first, second = (f"mp-0a1b2c3d-{letter * 32}" for letter in "ab")
    key = keys.adopt("prometheus", first)
    assert keys.adopt("prometheus", first) == key and keys.load() == [key]
    assert keys.Keyring().find(first) == key and key.admin is False
    changed = keys.adopt("prometheus", second)
    assert changed.id == key.id and len(keys.load()) == 1
    assert keys.Keyring().find(first) is None and keys.Keyring().find(second) == changed
    assert first not in keys.path().read_text() and second not in keys.path().read_text()
    with pytest.raises(UserError, match="under 32 characters"):
        keys.adopt("prometheus", "short")


def test_the_door_stays_shut_when_the_last_key_is_revoked(home: Path) -> None:
    ring = keys.Keyring()
    assert not ring.needed
    _, text = keys.create("one")
    assert ring.needed and ring.find(text) is not None
    keys.revoke("one")
    assert ring.needed and not ring.any and ring.find(text) is None
    assert keys.Keyring().needed, "also after a restart"
    keys.path().unlink()
    assert ring.needed, "a running server does not open because a file is gone"


def test_an_adopted_key_may_administer(home: Path) -> None:
    ring, text = keys.Keyring(), "x" * 40
    for admin in (True, False):
        assert keys.adopt("workers", text, admin=admin).admin == admin
        found = ring.find(text)
        assert found is not None and found.admin == admin
