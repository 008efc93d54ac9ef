"""The frame that all stages share: declared inputs, whole outputs, one line for a mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from metapeft import stages
from metapeft.errors import UserError
from metapeft.settings import Settings, load_settings
from metapeft.stages.stage import Stage, alone, assignments, content, nested, write_json


def counted(calls: list[str], name: str = "first", **declared: object) -> Stage:
    def body(settings: Settings, work: Path, out: Path) -> dict[str, object]:
        calls.append(name)
        (out / "value.txt").write_text(str(settings.seed))
        return {"seed": settings.seed}

    return Stage(name, body, settings=("seed",), **declared)  # type: ignore[arg-type]


def test_runs_once_for_the_same_inputs_and_again_when_a_declared_setting_changes(tmp_path: Path) -> None:
    calls: list[str] = []
    stage = counted(calls)
    first = stage.run(Settings(seed=1), tmp_path)
    again = stage.run(Settings(seed=1, task="undeclared"), tmp_path)
    assert (first.cached, again.cached) == (False, True)
    assert again.summary == {"seed": 1}
    assert not stage.run(Settings(seed=2), tmp_path).cached
    assert (tmp_path / "first/value.txt").read_text() == "2"
    assert len(calls) == 2


def test_a_changed_upstream_output_or_a_touched_output_makes_it_run_again(tmp_path: Path) -> None:
    calls: list[str] = []
    first, second = counted(calls, "first"), counted(calls, "second", needs=("first",))
    first.run(Settings(), tmp_path)
    second.run(Settings(), tmp_path)
    assert second.run(Settings(), tmp_path).cached
    (tmp_path / "second/value.txt").write_text("tampered")
    assert not second.run(Settings(), tmp_path).cached
    (tmp_path / "first/value.txt").write_text("other")
    assert not second.run(Settings(), tmp_path).cached


def test_needs_its_upstream(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"second needs first.*run the stage first first"):
        counted([], "second", needs=("first",)).run(Settings(), tmp_path)


def test_a_failed_run_leaves_the_earlier_output_and_nothing_half_written(tmp_path: Path) -> None:
    counted([]).run(Settings(seed=1), tmp_path)

    def breaks(settings: Settings, work: Path, out: Path) -> dict[str, object]:
        (out / "value.txt").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Stage("first", breaks, settings=("seed",)).run(Settings(seed=2), tmp_path)
    assert (tmp_path / "first/value.txt").read_text() == "1"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".stages", "first"]
    assert counted([]).run(Settings(seed=1), tmp_path).cached


def test_an_unwritable_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*file/work"):
        counted([]).run(Settings(), tmp_path / "file" / "work")


def test_a_pipeline_has_its_folder_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever comes second waits, and says so; what is there and current needs no waiting."""
    known = {"first": counted([]), "second": counted([], "second", needs=("first",))}
    monkeypatch.setattr(stages, "get", known.__getitem__)
    monkeypatch.setattr("metapeft.stages.stage.QUIET_SECONDS", 0.01)
    with ThreadPoolExecutor() as others:
        with alone(tmp_path):  # a command holds it too while it reads what its stages left
            stages.run(("first",), Settings(), tmp_path)
            assert others.submit(stages.run, ("first",), Settings(), tmp_path).result(10)["first"].cached
            assert "waiting" not in capsys.readouterr().err
            waiting = others.submit(stages.run, tuple(known), Settings(seed=2), tmp_path)
            time.sleep(0.3)
            assert not waiting.done() and (tmp_path / "first/value.txt").read_text() == "0"
            assert not stages.run(("second",), Settings(), tmp_path)["second"].cached
        assert not waiting.result(10)["first"].cached and (tmp_path / "second/value.txt").read_text() == "2"
    assert capsys.readouterr().err.count(f"waiting for another command that works in {tmp_path}") == 1


SLOW = """
    import sys, time
    from metapeft.stages.stage import Stage

    def body(settings, work, out):
        "Writes half, waits, writes the rest."
        (out / "a.txt").write_text("a")
        print("half", file=sys.stderr, flush=True)
        time.sleep(float(settings.task))
        (out / "b.txt").write_text("b")
        return {"done": True}

    raise SystemExit(Stage("slow", body, settings=("seed",)).main())
"""


def slow(tmp_path: Path, seconds: float, **environment: str) -> subprocess.Popen[str]:
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SLOW))
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, str(script), "--work", "out", "--set", f'task="{seconds}"'],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_minus_9_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    process = slow(tmp_path, 60)
    assert process.stderr is not None and process.stderr.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/slow").exists()
    out, err = slow(tmp_path, 0).communicate(timeout=30)
    assert json.loads(out.splitlines()[-1]) == {"done": True}, err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".stages", "slow"]
    assert {p.name for p in (tmp_path / "out/slow").iterdir()} == {"a.txt", "b.txt"}


def test_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    starter = tmp_path / "starter.py"
    (tmp_path / "slow.py").write_text(textwrap.dedent(SLOW))
    starter.write_text(
        textwrap.dedent("""
        import os, subprocess, sys
        child = subprocess.Popen(
            [sys.executable, "slow.py", "--work", "out", "--set", 'task="60"'],
            env={**os.environ, "METAPEFT_PARENT": str(os.getpid())}, start_new_session=True,
            stderr=subprocess.PIPE, text=True)
        child.stderr.readline()
        print(child.pid, flush=True)
        child.wait()
        """)
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "starter.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(child):
        time.sleep(0.1)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_main_reports_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert counted([]).main(["--work", str(tmp_path), "--set", "sed=3"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: setting sed")


def test_main_hides_the_traceback_of_a_defect_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(settings: Settings, work: Path, out: Path) -> dict[str, object]:
        raise ZeroDivisionError("by zero")

    stage = Stage("breaks", breaks, settings=())
    assert stage.main(["--work", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: ZeroDivisionError: by zero; run with --debug for the traceback\n"
    assert stage.main(["--work", str(tmp_path), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_given_settings_are_json_with_strings_as_fallback() -> None:
    given = assignments(["rank=8", "lr=1e-3", "name=a=b", "flag=true", 'quoted="8"', "sweep.trials=4"])
    assert given == {"rank": 8, "lr": 1e-3, "name": "a=b", "flag": True, "quoted": "8", "sweep.trials": 4}
    assert load_settings(None, **nested({"sweep.trials": 4, "seed": 3})).sweep.trials == 4
    with pytest.raises(UserError, match="KEY=VALUE"):
        assignments(["rank"])


def test_null_takes_a_limit_of_the_params_file_away(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("recommend: {max_seconds: 60}\nsweep: {trials: 4}\n")
    assert load_settings(params).recommend.max_seconds == 60
    given = nested(assignments(["recommend.max_seconds=null", "seed=3"]))
    assert load_settings(params, **given).recommend.max_seconds is None
    assert load_settings(params, **nested(assignments(["sweep=null"]))) == load_settings(
        None, recommend={"max_seconds": 60}
    )


def test_json_is_never_not_a_number_and_never_half(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_content_sees_names_and_bytes_but_not_caches(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = content(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("x")
    assert content(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert content(tmp_path) != first


def test_an_interrupt_that_a_finalizer_threw_away_is_heard() -> None:
    code = """
import os, signal, sys, time
from metapeft.stages.stage import hear_interrupts

class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # here it is raised, and ignored

signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[1:]:
    hear_interrupts()
Closing()
try:
    time.sleep(5)
except KeyboardInterrupt:
    print("heard")
"""
    heard, lost = (
        subprocess.run([sys.executable, "-c", code, *more], capture_output=True, text=True) for more in (["x"], [])
    )
    assert (heard.stdout, heard.stderr) == ("heard\n", "")
    assert lost.stdout == "" and "KeyboardInterrupt" in lost.stderr, "without it, it is lost"


def test_sigterm_stops_like_an_interrupt() -> None:
    code = """
import os, signal
from metapeft.stages.stage import hear_interrupts

hear_interrupts()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    print("given back")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "given back\n")
