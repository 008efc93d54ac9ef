"""What is said to people and written to logs arrives in whole lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

WRITERS, LINES = 4, 500

PROGRAM = f"""
import json, sys, threading
from metapeft.progress import say

sys.setswitchinterval(1e-6)

def speak(writer):
    for number in range({LINES}):
        say(json.dumps({{"writer": writer, "number": number}}))

threads = [threading.Thread(target=speak, args=(writer,)) for writer in range({WRITERS})]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", PROGRAM], stderr=file, timeout=120, check=True)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(said) == WRITERS * LINES
    for writer in range(WRITERS):
        assert [line["number"] for line in said if line["writer"] == writer] == list(range(LINES))


def test_a_closed_stderr_is_no_failure() -> None:
    program = "from metapeft.progress import say; say('x'); print('went on')"
    command = f'"{sys.executable}" -c "{program}" 2>&-'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "went on\n"
