"""Versions: a champion that gives way only to what is no worse, can be had back, and survives kill -9 and damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from metapeft.errors import UserError
from metapeft.meta import versions
from metapeft.meta.embedding import plain
from metapeft.meta.evaluate import OURS, Judged
from metapeft.meta.evidence import Observation
from metapeft.meta.fitting import fit
from metapeft.meta.model import Model
from metapeft.meta.unfinished import Remaining
from metapeft.meta.versions import Version
from metapeft.profiling import cache
from tests.meta.synthetic import world


@pytest.fixture(scope="module")
def observations() -> list[Observation]:
    return world(16, filled=0.6).observations()


def test_nothing_trained_means_what_ships() -> None:
    assert versions.champion() == versions.shipped() and versions.champion().number == 0
    with pytest.raises(UserError, match="no earlier version"):
        versions.rollback()
    with pytest.raises(UserError, match="no readable version 7"):
        versions.promote(7)


def test_families_are_the_witnesses_when_versions_are_compared() -> None:
    """More places of the same families do not make a difference surer."""

    def judged(regret: float, family: int) -> Judged:
        return Judged("t", "v", f"family{family}", 40, 600, 5, 0.9, 0.1, regret={OURS: regret}, crps=[0.1])

    random = np.random.default_rng(0)
    differences = random.normal(0.01, 0.03, size=8)
    once = [judged(0.1 + d, n) for n, d in enumerate(differences)], [judged(0.1, n) for n in range(8)]
    (worse, why), (again, said) = versions.compared(*once), versions.compared(5 * once[0], 5 * once[1])
    assert (again, said) == (worse, why)
    naive = differences.std(ddof=1) / np.sqrt(8)
    scattered = [judged(0.2 + d, n) for n, d in enumerate(differences)]
    worse, why = versions.compared(scattered, once[1])
    assert worse and f"± {naive:.4f}" in why, "with one place each it is the standard error of a mean"
    sure = [judged(0.1 + 1.5 * naive, n) for n in range(8)]
    assert versions.compared(sure, once[1])[0], "where all families say so it is worse"


def test_too_few_tasks_are_refused(observations: list[Observation]) -> None:
    with pytest.raises(UserError, match="experience has 0 tasks"):
        versions.train([])
    few = [o for o in observations if o.task.name in ("sms_spam", "trec6")]
    with pytest.raises(UserError, match="2 tasks"):
        versions.train(few)


def test_train_promotes_keeps_and_rolls_back(observations: list[Observation], home: Path) -> None:
    first = versions.train(observations)
    assert (first.version, first.promoted) == (1, True)
    assert versions.champion().model.to_json() == first.model
    second = versions.train(observations[:-1])
    assert second.version == 2 and second.promoted  # nearly the same again is no worse
    assert versions.rollback().number == 1 and versions.champion().number == 1
    assert versions.rollback().number == 0
    assert versions.promote(2).number == 2
    assert [v.number for v in versions.versions()] == [0, 1, 2]
    judged = json.loads((home / "meta" / "versions" / "0002.json").read_text())["judged"]
    assert judged["against"] == 1 and judged["challenger"]["regret"] >= 0


def test_nothing_new_adds_no_version_to_go_back_to(observations: list[Observation]) -> None:
    first = versions.train(observations)
    again = versions.train(observations)
    assert (again.version, again.promoted, again.reason) == (1, False, "nothing new; version 1 stays champion")
    assert (again.model, again.tasks, again.observations) == (first.model, first.tasks, first.observations)
    assert [v.number for v in versions.versions()] == [0, 1]
    assert versions.rollback().number == 0, "one promotion, one way back"
    assert versions.train(observations).version == 2, "whoever went back may train again"


def test_what_curves_that_broke_off_leave_open_is_kept(observations: list[Observation]) -> None:
    learned = Remaining(((0.3, 0.1), (0.2, 0.1), (0.1, 0.1)))
    versions.train(observations, learned)
    assert versions.champion().model.remaining == learned
    assert versions.train(observations[:-1]).version == 2
    assert versions.numbered(2).model.remaining == learned, "as the champion has it"
    assert versions.shipped().model.remaining != Remaining(), "learned from what ships"


def test_a_worse_challenger_is_kept_but_not_promoted(
    observations: list[Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.train(observations)
    broken = Model(metric=plain(), level_scale=30.0, choice_scale=30.0)
    with monkeypatch.context() as patch:
        real = versions.judge
        patch.setattr(versions, "fit", lambda known: broken if len(known) == len(observations) else fit(known))
        patch.setattr(versions, "judge", lambda o, fitted=None, rival=(): real(o, fitted or (lambda _: broken), rival))
        found = versions.train(observations)
    assert not found.promoted and "is worse by" in found.reason
    assert versions.champion().number == 1 and len(versions.versions()) == 3


def test_damaged_files_give_way_to_what_can_be_read(home: Path) -> None:
    for _ in range(2):
        number = versions._add(Version(0, Model())).number
        versions.promote(number)
    (home / "meta" / "versions" / "0002.json").write_text('{"schema": 1, "numb')
    assert versions.champion().number == 1
    (home / "meta" / "champion.json").write_text("")
    assert versions.champion().number == 0
    newer = json.loads((home / "meta" / "versions" / "0001.json").read_text()) | {"schema": 99}
    (home / "meta" / "versions" / "0001.json").write_text(json.dumps(newer))
    assert [v.number for v in versions.versions()] == [0]


def _adding(path: str) -> int:
    os.environ["METAPEFT_HOME"] = path
    return versions._add(Version(0, Model())).number


def test_two_at_once_get_two_numbers(home: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        numbers = pool.map(_adding, [str(home)] * 6)
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]


def test_two_trainings_at_once_take_turns(observations: list[Observation]) -> None:
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(versions.train, [observations] * 2))
    assert sorted(one.promoted for one in found) == [False, True]
    assert {one.version for one in found} == {1} and [v.number for v in versions.versions()] == [0, 1]


def test_a_promotion_waits_for_another_and_comes_after_it(home: Path) -> None:
    for _ in range(2):
        versions._add(Version(0, Model()))
    code = "from metapeft.meta import versions\nprint('ready', flush=True)\nversions.promote(2)\n"
    with FileLock(home / "meta" / "champion.lock"):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        cache.write(home / "meta" / "champion.json", {"champion": 1, "before": [0]})
    assert process.wait() == 0
    assert versions._succession() == (2, [0, 1])
    assert versions.rollback().number == 1


def test_kill_while_writing_leaves_whole_versions(home: Path) -> None:
    code = (
        "from metapeft.meta import versions\nfrom metapeft.meta.model import Model\n"
        "print('ready', flush=True)\n"
        "while True:\n    versions.promote(versions._add(versions.Version(0, Model())).number)\n"
    )
    for delay in (0.0, 0.03, 0.11):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        paths = sorted((home / "meta" / "versions").glob("[0-9]*.json"))
        assert all(versions._read(path) is not None for path in paths)
        assert versions.champion().number <= len(paths)
    assert versions._add(Version(0, Model())).number == len(paths) + 1


def test_a_model_survives_json(observations: list[Observation]) -> None:
    model = replace(Model(), reach=0.25, level_scale=1.5)
    assert Model.from_json(json.loads(json.dumps(model.to_json()))) == model
