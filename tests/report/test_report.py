from __future__ import annotations

import html
import itertools
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from metapeft.errors import UserError
from metapeft.report import Content, page, write_report
from metapeft.report.page import render
from metapeft.search import pareto
from metapeft.training.trial import Score, Trial
from tests.report.examples import TASK, content, trials

VOID = {"meta", "br", "link", "img", "input", "hr"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """Checks that tags are balanced; collects text, ids, and everything that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data") and value]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def words(page: str) -> str:
    return " ".join(" ".join(read(page).text).replace("\u202f", " ").split())


def test_the_page_stands_alone() -> None:
    page = render(content())
    reader = read(page)
    assert reader.loads == [] and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert not re.search(r"https?://", page)
    assert len(reader.ids) == len(set(reader.ids)), "ids are unique"
    assert len(page) < 200_000


def test_it_says_what_a_reader_wants_to_know() -> None:
    given = content()
    assert given.final is not None and given.final.score is not None
    text = words(render(given))
    score = f"{100 * given.final.score.value:.1f} %"
    assert f"LoRA reaches {score} accuracy on 300 test examples" in text
    gain = 100 * (given.final.score.value - given.final.untuned_score.value)  # type: ignore[union-attr]
    assert f"{gain:.1f} points more than the untuned backbone" in text
    assert "15 configurations were tried" in text
    assert "Not in the picture: 2 diverged, 1 out of memory." in text
    for name in pareto.NAMES:
        assert name in text.lower()
    assert "metapeft train 'my reviews.jsonl' --method lora" in text
    assert "From earlier trials on other tasks" in text and "90 % intervals" in text and "flowers (83 %)" in text
    assert "< 1 %" in text and "150 s" in text and "1.4 GB" in text
    assert "1 of 2 checks passed: 1 warning." in text and "yes is 10 % of the rows" in text
    assert "mean tokens 31.25" in text and "examples 20 000" in text and "zero shot loss –" in text
    assert "20 train, 20 validation, 20 test" in text and "2 rows dropped" in text and "MIT" in text
    assert "The first 2 rows of the test split" in text and "Never again. no yes no Long Long" in text
    assert "Long… yes nothing no ✗" in text
    assert "task-reviews, version 3" in text and "device cpu" in text and "blas" not in text


def test_without_a_sweep_the_one_training_is_drawn(tmp_path: Path) -> None:
    given = content()
    given.trials = ()
    text = words(write_report(tmp_path, given).html.read_text())
    assert "How it learned" in text and "loss on validation" in text
    assert "What it costs to be better" not in text and "All trials" not in text


def test_what_comes_from_outside_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    given = content()
    given.task = replace(TASK, name=evil, labels=(evil,), source=evil, notes=(evil,))
    given.called, given.model, given.environment = evil, evil, {evil: evil}
    for trial in given.trials:
        trial.task, trial.error, trial.backbone, trial.id = evil, evil, evil, trial.id + evil
        trial.configuration = trial.configuration | {"targets": [evil]}
    given.profile = {"features": {evil: 1.0}}
    given.examples = [dict.fromkeys(("text", "expected", "untuned", "tuned"), evil) | {"right": False}]
    given.validation = {"checks": [{"name": evil, "ok": False, "severity": evil, "detail": evil}]}
    page = render(given)
    reader = read(page)
    assert reader.scripts == 1 and reader.loads == [] and reader.handlers == []
    assert html.escape("<script>alert(1)</script>") in page


@pytest.mark.parametrize("missing", ["everything", "final", "trials", "one trial", "all broken", "untuned", "scores"])
def test_whatever_is_missing_is_left_out(missing: str, tmp_path: Path) -> None:
    given = content()
    if missing == "everything":
        given = Content(TASK)
    elif missing == "final":
        given.final = None
    elif missing == "trials":
        given.trials = ()
    elif missing == "one trial":
        given.trials = given.trials[:1]
    elif missing == "all broken":
        given.trials = [t for t in given.trials if t.status != "ok"]
        given.final = given.trials[0]
    else:
        for trial in given.trials:
            trial.untuned_score = None
            if missing == "scores":
                trial.score = trial.validation = None
                trial.curve = [row | {"validation_loss": math.nan, "validation_score": None} for row in trial.curve]
    if missing == "scores":
        assert given.recommendation is not None
        for entry in given.recommendation["recommendations"]:
            entry |= {"score": None, "p_best": None}
    paths = write_report(tmp_path, given)
    text = words(paths.html.read_text()).replace("the loss was nan at step 10", "")
    assert "nan" not in text.lower().split() and "None" not in text and "inf" not in text.split()
    assert paths.curves.exists() == bool(given.trainings())
    assert paths.trade_offs.exists() == paths.parallel.exists() == bool(given.trials)


def test_numbers_that_are_not_finite_do_not_break_it(tmp_path: Path) -> None:
    given = content()
    given.trials[0].validation = Score("accuracy", math.nan, math.nan, 0, math.inf)
    given.trials[1].validation = Score("accuracy", 0.8, math.nan, 1, math.inf)
    given.trials[2].curve[-1]["validation_loss"] = math.inf
    given.trials[3].peak_memory_mb = math.inf
    page = write_report(tmp_path, given).html.read_text()
    assert not re.search(r'(cx|cy|x|y|d|r)="[^"]*(nan|inf)', page)


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_report(tmp_path / "out", Content(TASK))
    before = {path: path.read_bytes() for path in (first.html,)}
    write_report(tmp_path / "out", content())
    assert all(path.read_bytes() != old for path, old in before.items())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "curves.png",
        "parallel.png",
        "report.html",
        "trade_offs.png",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report to"):
        write_report(tmp_path / "file" / "out", content())


def test_pictures_show_the_methods_in_their_colours(tmp_path: Path) -> None:
    from PIL import Image

    from metapeft.report import wording

    paths = write_report(tmp_path, content())
    for path in (paths.trade_offs, paths.curves, paths.parallel):
        with Image.open(path) as image:
            assert image.width > 1000 and image.height > 500
            seen = {color for _, color in image.convert("RGB").getcolors(1_000_000)}  # type: ignore[union-attr, misc]
        for colour in wording.COLOURS.values():
            assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in seen


def test_the_best_trial_is_the_one_that_was_kept() -> None:
    given = content()
    assert given.final is not None and given.best() == given.final.id
    given.final = replace(given.final, id="trained longer", budget=400)
    assert given.best() == pareto.named(given.trials)["most accurate"].id
    given.final = None
    assert given.best() == pareto.named(given.trials)["most accurate"].id
    assert Content(TASK).best() == ""


def test_trials_over_a_limit_are_named_but_not_on_the_front() -> None:
    done: list[Trial] = [t for t in trials() if t.status == "ok"]
    slowest = max(done, key=lambda t: t.train_seconds)
    text = words(render(Content(TASK, done, {slowest.id: "seconds"})))
    assert "1 broke a limit" in text and "breaks the limit on seconds" in text
    text = words(render(Content(TASK, done, {slowest.id: "diverged with another seed"})))
    assert "1 did not end well with every seed" in text and "limit" not in text.split("Trials")[0]


def test_the_front_grows_over_the_time_of_all_trials() -> None:
    done = [t for t in trials() if t.status == "ok"][:4]
    drawn: list[list[float]] = []

    def growth(times: list[float], shares: list[float], width: int) -> str:
        drawn.append(times)
        return ""

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page.charts, "growth", growth)
        page._search(Content(TASK, done, {done[0].id: "stopped", done[2].id: "stopped"}))
    whole = list(itertools.accumulate(t.seconds for t in done))
    assert drawn[0] == [whole[1], whole[3]]


PROBE = """
<body><iframe src="{page}" style="width:390px;height:3000px;border:0"></iframe><script>
addEventListener("load", () => {{
  const inner = document.querySelector("iframe"), page = inner.contentDocument, view = inner.contentWindow;
  const shown = e => e.getClientRects().length > 0;
  const marks = [...page.querySelectorAll("svg .mark")].filter(shown), tip = page.getElementById("tip");
  const box = marks[0].getBoundingClientRect();
  marks[0].dispatchEvent(new view.PointerEvent("pointermove", {{clientX: box.left, clientY: box.top, bubbles: true}}));
  const texts = [...page.querySelectorAll("svg text")].filter(shown);
  const result = {{
    width: page.documentElement.scrollWidth, tip: tip.textContent, opacity: view.getComputedStyle(tip).opacity !== "",
    on: page.querySelectorAll(".mark.on").length,
    smallest: Math.min(...texts.map(t => t.getBoundingClientRect().height)),
    outside: texts.filter(t => {{ const b = t.getBoundingClientRect(); return b.left < 0 || b.right > 390; }}).length,
  }};
  document.body.setAttribute("data-result", JSON.stringify(result));
}});
</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_phone_shows_it_without_scrolling_sideways_and_with_hover(tmp_path: Path) -> None:
    import json

    page = write_report(tmp_path, content()).html
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page=page.as_uri()))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--dump-dom",
        "--hide-scrollbars",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--allow-file-access-from-files", "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([str(CHROMIUM), *flags, probe.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-result="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert result["width"] == 390, "nothing is wider than the phone"
    assert result["tip"].count("\n") >= 4 and result["on"] >= 1, "the hover shows the settings"
    assert result["smallest"] >= 11 and result["outside"] == 0, "texts in the pictures are readable and inside"
