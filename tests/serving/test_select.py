"""Selections: when an answer is made anew, what becomes of failures, what is kept of uploads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metapeft import api
from metapeft.errors import UserError
from metapeft.meta import versions
from metapeft.meta.experience import Experience
from metapeft.meta.model import Model
from metapeft.monitoring.remeasure import Remeasured
from metapeft.profiling import Profile, cache
from metapeft.serving import select
from metapeft.serving.engine import Busy
from metapeft.serving.select import Job, Selector
from metapeft.stages.files import read_task
from tests.backbones.tiny import tiny_folder
from tests.serving.made import trial

ROWS = [{"text": f"a {'good' if n % 2 else 'bad'} thing, number {n}", "label": ["no", "yes"][n % 2]} for n in range(60)]
REQUEST = {"rows": ROWS, "name": "mine"}


def backbone() -> str:
    return str(tiny_folder("llama"))


def ended(selector: Selector, job: Job) -> Job:
    until = time.monotonic() + 300
    while (now := selector.get(job.id)) is not None and now.state in select.WAITING:
        assert time.monotonic() < until, now
        time.sleep(0.05)
    assert now is not None
    return now


def work_of(job: Job, params: Path | None = None) -> Path:
    return api.work_folder(api.settings_for(job.request["task"], params=params, backbone=backbone()))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Job]]:
    """METAPEFT_HOME where the rows were uploaded and measured by a server's own process."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAPEFT_HOME", str(home))
        selector = Selector(backbone(), parameters(home))
        selector.start()
        job = ended(selector, selector.ask(REQUEST))
        selector.stop()
        assert job.state == "done", job.error
        yield home, job


def parameters(home: Path) -> Path:
    path = home / "params.yaml"
    if not path.exists():
        path.write_text("seed: 0\n", encoding="utf-8")
    return path


def test_an_answer_is_made_anew_when_what_it_was_made_from_changes(
    measured: tuple[Path, Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, job = measured
    monkeypatch.setenv("METAPEFT_HOME", str(home))
    params, running = parameters(home), Selector(backbone(), parameters(home))
    work = work_of(job, params)
    assert running.ask(REQUEST) == job  # what the measuring process had said, after a restart

    def renewed(change: Callable[[], Any]) -> dict[str, Any]:
        """What a server that goes on says after it; and says again, as one that was restarted does."""
        before = running.ask(REQUEST)
        change()
        after = running.ask(REQUEST)
        assert after.state == "done" and after.experience != before.experience and after.created > before.created
        assert running.ask(REQUEST) is after and Selector(backbone(), params).ask(REQUEST) == after
        assert after.recommendation is not None
        return after.recommendation

    def promote() -> None:
        versions.promote(versions._add(replace(versions.shipped(), model=Model(), seen=())).number)

    def exchange() -> None:
        versions._path(1).unlink()
        versions._add(replace(versions.shipped(), seen=()))

    shipped = job.recommendation
    assert shipped is not None and shipped["model"] == 0
    refitted = renewed(promote)
    assert refitted["model"] == 1 and refitted["recommendations"] != shipped["recommendations"]
    assert renewed(exchange)["recommendations"] == shipped["recommendations"]  # the same number with other contents
    assert renewed(versions.rollback) == shipped
    assert renewed(lambda: params.write_text("train: {steps: 7}\n", encoding="utf-8"))["steps"] == 7
    tried = replace(trial(backbone(), "another", "lora", 0.9, 1), configuration={"method": "lora", "rank": 2})
    renewed(lambda: Experience().append(tried))

    kept = work / "profile" / "profile.json"
    profile = Profile.from_json(json.loads(kept.read_text(encoding="utf-8")))

    def known(version: str) -> None:
        cache.write(
            home / "profiles" / f"{version}-accuracy-x-1.json", replace(profile, task_version=version).to_json()
        )

    before = running.ask(REQUEST)
    known("f" * 16)  # of a task that was measured, and never tried
    assert running.ask(REQUEST) is before
    renewed(lambda: known(tried.task_version))
    [speed] = (home / "speed").glob("*.json")
    renewed(lambda: cache.write(speed, {**json.loads(speed.read_text(encoding="utf-8")), "gradient": 1.0}))

    (tmp_path / "package.py").touch()
    before = running.ask(REQUEST)
    with monkeypatch.context() as patch:
        patch.setattr(select, "PACKAGE", tmp_path)
        upgraded = Selector(backbone(), params).ask(REQUEST)
    assert upgraded.state == "done" and upgraded.created > before.created

    features = {**profile.features, "probe_accuracy": 0.1}
    again = replace(profile, features=features)
    Remeasured(read_task(work / "version"), again, {"probe_accuracy": 2.0}, "", (kept,)).mend()
    assert running.ask(REQUEST).state == "queued"  # what the stage left of the old profile is gone


def test_the_rows_of_an_upload_are_nobody_elses(measured: tuple[Path, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    home, job = measured
    monkeypatch.setenv("METAPEFT_HOME", str(home))
    work = work_of(job, parameters(home))
    file = Path(job.request["task"])
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == ROWS
    places = {path: path.stat().st_mode & 0o777 for path in (file, file.parent, file.parents[1], work)}
    assert places == {file: 0o600, file.parent: 0o700, file.parents[1]: 0o700, work: 0o700}
    assert (work / "version" / "data.jsonl").exists()  # which holds them as well


def test_a_failure_is_tried_again_after_a_minute_also_after_a_restart(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "data").touch()  # where downloaded tasks belong: nothing can be written there
    old = home / "serving" / "uploads" / "0123456789abcdef01234567"
    old.mkdir(parents=True)
    monkeypatch.setattr(select, "UPLOADS", 0)
    selector = Selector(backbone())
    selector.start()
    failed = ended(selector, selector.ask({"task": "trec6"}))
    selector.stop()
    assert failed.state == "failed" and failed.input_error and "cannot write" in failed.error
    assert not old.exists()  # things were tidied up nevertheless
    assert selector.ask({"task": "trec6"}) == Selector(backbone()).ask({"task": "trec6"}) == failed
    assert selector.get(failed.id) == failed

    with monkeypatch.context() as patch:
        patch.setattr(select, "AGAIN", 0.0)
        assert selector.ask({"task": "trec6"}).state == "queued"
    select._write(replace(failed, ended=failed.ended - 61))
    assert Selector(backbone()).ask({"task": "trec6"}).state == "queued"


def test_a_failure_of_an_earlier_version_is_tried_again(home: Path) -> None:
    failed = Selector(backbone()).ask({"task": "trec6"})
    record = {**failed.__dict__, "state": "failed", "error": "cannot download", "input_error": True}
    del record["ended"]  # which it did not write
    cache.write(select.folder() / f"{failed.id}.json", record)
    assert Selector(backbone()).ask({"task": "trec6"}).state == "queued"


def upload(number: int) -> dict[str, Any]:
    return {"rows": [{"text": f"text {number}", "label": "a"}, {"text": "another", "label": "b"}]}


def test_an_upload_that_is_refused_is_not_stored(home: Path) -> None:
    selector = Selector(backbone())
    for number in range(select.QUEUE):
        assert selector.ask(upload(number)).state == "queued"
    with pytest.raises(Busy):
        selector.ask(upload(select.QUEUE))
    assert len(list((home / "serving" / "uploads").iterdir())) == select.QUEUE
    assert selector.ask(upload(0)).state == "queued"  # which waits already


def test_an_upload_that_cannot_be_stored_is_not_queued(home: Path) -> None:
    (home / "serving").mkdir()
    (home / "serving" / "uploads").touch()
    selector = Selector(backbone())
    with pytest.raises(UserError, match="cannot write"):
        selector.ask(upload(0))
    assert selector.waiting == 0 and selector.recent() == []


def test_the_oldest_uploads_go_and_those_that_wait_stay(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "UPLOADS", 2)
    monkeypatch.setattr(select, "KEPT", 3)
    selector = Selector(backbone())
    jobs = [selector.ask(upload(number)) for number in range(6)]
    works = [work_of(job) for job in jobs]
    for number, (job, work) in enumerate(zip(jobs, works, strict=True)):
        (work / "version").mkdir(parents=True)
        if number:  # the very oldest still waits
            selector._remember(replace(job, state="done", recommendation={}))
        for path in (select.folder() / f"{job.id}.json", Path(job.request["task"]).parent):
            os.utime(path, (number, number))
    (works[2] / "sweep").mkdir()
    waits = Selector(backbone())  # after a restart
    waits._tidy()
    assert [Path(job.request["task"]).exists() for job in jobs] == [True, False, False, False, True, True]
    assert [work.exists() for work in works] == [True, False, True, False, True, True]
    assert [waits.get(job.id) is not None for job in jobs] == [True, False, False, True, True, True]
    assert (
        selector.ask(upload(1)).state == "queued" and Path(jobs[1].request["task"]).exists()
    )  # sent again, kept again
