"""The operator runs real stage processes. The project folder shadows the package, so the stages here are small ones."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from metapeft.airflow import operators
from metapeft.airflow.operators import CommandOperator, ProcessOperator, StageOperator, work_folder

STAGES = {
    "good": """
        import json, os, sys
        print("step 1 of 2", file=sys.stderr)
        print("noise")
        print(json.dumps({"arguments": sys.argv[1:], "pid": os.getpid(), "group": os.getpgid(0), "run_url": "http://x/1"}))
    """,
    "bad_input": """
        import sys
        print("loading", file=sys.stderr); print("error: no such task; fetch it", file=sys.stderr); sys.exit(2)
    """,
    "breaks": """
        import sys
        print("error: disk full", file=sys.stderr); sys.exit(1)
    """,
    "greedy": """
        import os, subprocess, sys, time
        print("given", os.environ.get("METAPEFT_MEMORY_MB"), os.environ.get("METAPEFT_DEVICE"), file=sys.stderr)
        child = "held = b'x' * (300 << 20); import time; time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", child])
        time.sleep(600)
    """,
    "killed": """
        import os, signal, sys
        print("step 3 of 9", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGKILL)
    """,
    "leaves": """
        import subprocess, sys
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    """,
    "silent": """
        import time
        time.sleep(2)
    """,
    "waits": """
        import os, pathlib, signal, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c",
            "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"],
            stdout=subprocess.PIPE)
        child.stdout.readline()
        pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    """,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "metapeft" / "stages"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):  # a regular package: one without it would not shadow an installed one
        (package / "__init__.py").touch()
    for name, text in STAGES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def operator(project: Path, stage: str, **arguments: object) -> StageOperator:
    return StageOperator(task_id=stage, stage=stage, work="dag/run", project=str(project), **arguments)


def test_runs_in_a_fresh_process_of_its_own_group_and_returns_the_summary(project: Path) -> None:
    task = operator(project, "good")
    summary = task.execute({})
    assert summary["pid"] == summary["group"] != os.getpid()
    assert summary["arguments"] == ["--work", str(project / "home/airflow/dag/run")]
    assert task.run_url == "http://x/1"


def test_the_form_overrides_settings_and_an_empty_field_takes_the_value_away(project: Path) -> None:
    given, form = {"seed": 1, "task": "a b"}, {"seed": "seed", "most": "recommend.max_seconds", "other": "train.steps"}
    task = operator(project, "good", settings=given, form=form)
    arguments = task.execute({"params": {"seed": 7, "most": None}})["arguments"]
    assert arguments[2:] == ["--set", "seed=7", "--set", 'task="a b"', "--set", "recommend.max_seconds=null"]


def test_what_a_stage_leaves_behind_is_not_waited_for(project: Path) -> None:
    begin = time.monotonic()
    operator(project, "leaves").execute({})
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("text", ["4GB", "-1", "0", "nan"])
def test_a_limit_that_is_no_number_is_said_and_not_tried_again(
    project: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("METAPEFT_MEMORY_MB", text)
    with pytest.raises(AirflowFailException, match=f"METAPEFT_MEMORY_MB={text} is no number of MiB"):
        operator(project, "good").execute({})


def test_progress_goes_to_the_task_log(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    operator(project, "good").execute({})
    assert "step 1 of 2" in capsys.readouterr().out


def test_bad_input_is_not_tried_again_and_says_why(project: Path) -> None:
    with pytest.raises(AirflowFailException, match=r"^bad_input: no such task; fetch it$"):
        operator(project, "bad_input").execute({})


def test_another_failure_is_tried_again(project: Path) -> None:
    with pytest.raises(AirflowException, match="exit code 1: disk full") as caught:
        operator(project, "breaks").execute({})
    assert not isinstance(caught.value, AirflowFailException)


def test_memory_is_limited_with_all_that_the_stage_starts(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stage is told a little less, so that it can refuse before it is ended; the whole family counts."""
    with pytest.raises(AirflowException, match=r"it used \d+ MB, more than its memory limit") as caught:
        operator(project, "greedy", memory_mb=200, device="cpu").execute({})
    assert not isinstance(caught.value, AirflowFailException), "a resumed stage may do better"
    assert "given 180 cpu" in capsys.readouterr().out


def test_the_workers_own_limit_counts_where_the_task_has_none(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAPEFT_MEMORY_MB", "200")
    with pytest.raises(AirflowException, match="memory limit"):
        operator(project, "greedy").execute({})


def test_a_killed_stage_says_by_what_and_where_it_was(project: Path) -> None:
    with pytest.raises(AirflowException, match=r"killed was ended by SIGKILL; its last line: step 3 of 9"):
        operator(project, "killed").execute({})


def test_silent_work_is_heard_of_now_and_then(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "QUIET_SECONDS", 0.5)
    assert operator(project, "silent").execute({}) == {}
    assert "at work for" in capsys.readouterr().out


def test_commands_print_one_json_value_and_take_options_from_the_form(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "metapeft" / "cli.py").write_text(
        "import json, sys; print(json.dumps({'words': sys.argv[1:]}, indent=2))"
    )
    task = CommandOperator(
        task_id="grow",
        arguments=["experience", "grow"],
        form={"max_seconds": "--max-seconds", "tasks": "--tasks"},
        project=str(project),
    )
    words = task.execute({"params": {"max_seconds": 60, "tasks": None}})["words"]
    assert words == ["experience", "grow", "--max-seconds", "60", "--json"]
    words = task.execute({"params": {"max_seconds": None, "tasks": ["one", "two"]}})["words"]
    assert words == ["experience", "grow", "--tasks", "one", "--tasks", "two", "--json"]


def test_any_module_can_be_run(tmp_path: Path) -> None:
    task = ProcessOperator(task_id="tool", module="json.tool", arguments=["--help"], project=str(tmp_path))
    with pytest.raises(ValueError, match="Expecting value"):  # help is no JSON
        task.execute({})


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def waiting(project: Path) -> list[int]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (project / "pids").exists() and len(pids := (project / "pids").read_text().split()) == 2:
            return [int(pid) for pid in pids]
        time.sleep(0.05)
    raise AssertionError("the stage did not start")


def test_on_kill_ends_the_whole_process_group(project: Path) -> None:
    """Also a grandchild that ignores SIGTERM."""
    task = operator(project, "waits")
    ended: list[BaseException] = []

    def execute() -> None:
        try:
            task.execute({})
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    pids = waiting(project)
    task.on_kill()
    thread.join(timeout=20)
    assert not thread.is_alive() and isinstance(ended[0], AirflowException)
    time.sleep(0.2)
    assert all(gone(pid) for pid in pids)


def test_a_timeout_raised_inside_execute_leaves_no_orphan(project: Path) -> None:
    class Timeout(BaseException):
        pass

    def ring(*_: object) -> None:
        raise Timeout

    before = signal.signal(signal.SIGALRM, ring)
    try:
        task = operator(project, "waits")
        threading.Thread(target=lambda: (waiting(project), os.kill(os.getpid(), signal.SIGALRM)), daemon=True).start()
        with pytest.raises(Timeout):
            task.execute({})
    finally:
        signal.signal(signal.SIGALRM, before)
    time.sleep(0.2)
    assert all(gone(pid) for pid in waiting(project))


def test_run_ids_become_plain_folder_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METAPEFT_HOME", "state")
    folder = work_folder("tune_task/manual__2026-11-23T19:16:00+00:00", str(tmp_path))
    assert folder == tmp_path / "state/airflow/tune_task/manual__2026-11-23T19_16_00_00_00"
    assert work_folder("tune_task/..", str(tmp_path)).parent == folder.parent
    for given, place in (("~/state", Path("~/state").expanduser()), ("", tmp_path / ".metapeft")):
        monkeypatch.setenv("METAPEFT_HOME", given)
        assert work_folder("a/b", str(tmp_path)) == place / "airflow/a/b"
