"""The stage that reads the user's file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from metapeft import api
from metapeft.errors import UserError
from metapeft.settings import load_settings
from tests.stages.made import spam_file


def test_what_may_not_be_read_is_the_users_mistake() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        secret = spam_file(folder)
        secret.chmod(0)
        closed = folder / "closed"
        closed.mkdir()
        inside = spam_file(closed)
        closed.chmod(0)
        (folder / "home").mkdir(mode=0o777)
        (folder / "home").chmod(0o777)
        was = os.geteuid()
        try:
            if was == 0:
                os.seteuid(65534)  # root may read everything; nobody may not
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("METAPEFT_HOME", str(folder / "home"))
                for path in (secret, inside, closed):
                    api.work_folder(load_settings(task=str(path)))
                    with pytest.raises(UserError, match=r"cannot read .*permission"):
                        api.profile(path)
        finally:
            os.seteuid(was)
            closed.chmod(0o755)
